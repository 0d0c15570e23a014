"""What a file says of where it came from: that a model made it, which one, and who ran it.

It owns the words, which are those of C2PA and IPTC, unsigned; it knows nothing of how formats carry them (`media`).
Nothing here is of one job or one moment, so that the same frames still give the same bytes.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from xml.sax.saxutils import escape

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model made, which C2PA uses too."""
DISTRIBUTION = "stiv-platform"


@dataclass(frozen=True, slots=True)
class Provenance:
    model: str
    manifest: str
    """sha256 of the engine's manifest."""
    prompt: str | None = None
    """Only where the server is told to embed it."""

    @property
    def generator(self) -> str:
        return f"{DISTRIBUTION}/{version(DISTRIBUTION)}"

    def as_json(self) -> str:
        said = {
            "claim_generator": self.generator,
            "action": "c2pa.created",
            "digitalSourceType": SOURCE_TYPE,
            "model": self.model,
            "manifest": f"sha256:{self.manifest}",
        }
        return json.dumps(said if self.prompt is None else said | {"prompt": self.prompt})

    def as_xmp(self) -> bytes:
        """A packet as pictures carry it: IPTC's field for readers who know no more, the whole as the description."""
        fields = (
            f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
            f"<xmp:CreatorTool>{escape(self.generator)}</xmp:CreatorTool>"
            f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{escape(self.as_json())}</rdf:li></rdf:Alt>'
            "</dc:description>"
        )
        spaces = " ".join(f'xmlns:{name}="{url}"' for name, url in _NAMESPACES.items())
        packet = (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
            f'<rdf:RDF {spaces}><rdf:Description rdf:about="">{fields}</rdf:Description></rdf:RDF></x:xmpmeta>'
            '<?xpacket end="r"?>'
        )
        return packet.encode()


_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
