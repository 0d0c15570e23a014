"""Fetching an image that a client names by URL, from hosts that the operator names and no others.

It owns that rule; it knows nothing of images. By default there is no such host, so a client can make the server
call nobody.
"""

from collections.abc import Collection

import httpx

TIMEOUT_S = 10.0


class NotFetched(ValueError):
    """Why the URL is not read, in words for the client."""


def fetch_image(url: str, hosts: Collection[str], max_bytes: int) -> bytes:
    """The body of an https URL on one of `hosts`; no redirect is followed, no port but 443 is asked."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise NotFetched("image_url is no URL; upload the image, or send a data: URL") from None
    if parts.scheme != "https" or parts.host not in hosts or parts.port not in (None, 443) or parts.userinfo:
        allowed = f" but of {', '.join(sorted(hosts))}, by https" if hosts else ""
        raise NotFetched(f"image URLs are not fetched by this server{allowed}; upload the image, or send a data: URL")
    try:
        with httpx.stream("GET", parts, timeout=TIMEOUT_S, follow_redirects=False) as answer:
            if answer.status_code != 200:
                raise NotFetched(f"'{parts.host}' answered {answer.status_code}; upload the image instead")
            data = bytearray()
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    raise NotFetched(f"the image is larger than {max_bytes} bytes; send a smaller one")
    except httpx.HTTPError as error:
        raise NotFetched(f"'{parts.host}' did not answer ({type(error).__name__}); upload the image instead") from None
    return bytes(data)
