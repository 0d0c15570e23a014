"""The web page at `/`: files of this package, served as they are under a strict policy. It knows nothing of the API."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from infra.serving.http.errors import ApiError, shown

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}

router = APIRouter(include_in_schema=False)


@router.get("/")
def index() -> Response:
    return file("index.html")


@router.get("/static/{name}")
def file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(404, f"the page has no file '{shown(name)}'", code="not_found")
    kind = f"{TYPES[Path(name).suffix]}; charset=utf-8"
    headers = {"content-type": kind, "content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(FILES[name], headers=headers)
