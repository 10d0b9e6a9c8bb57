"""What a sample's file says of itself: that it is generated, and by which prompt, seed, settings and weights.

Every mp4, gif and png has an XMP packet with IPTC's DigitalSourceType. Title and comment are the prompt and the
request, as JSON, which ordinary tools show (`exiftool FILE`, `ffprobe FILE`). Paths of the machine are in neither.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from lavie_jax.data.embedded import Metadata, read_metadata
from lavie_jax.errors import UserError
from lavie_jax.stages.settings import DTYPES
from lavie_jax.text_files import read_json

GENERATED_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# The field names and namespaces are IPTC's (Photo Metadata Standard 2023.1) and Adobe's.
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<xmp:CreatorTool>lavie_jax</xmp:CreatorTool>{description}
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
_DESCRIPTION = '\n<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>'
REQUEST = "request"


_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def _packet(text: str) -> str:
    return _PACKET.format(source=GENERATED_SOURCE, description=_DESCRIPTION.format(escape(text)) if text else "")


GENERATED = Metadata(xmp=_packet(""))


def describe(request: Mapping[str, Any], dtype: str | None = None) -> Metadata:
    """Returns the metadata of a sample with this request, computed in `dtype` if that is known."""
    comment = json.dumps({REQUEST: request} | ({"dtype": dtype} if dtype else {}), ensure_ascii=False)
    title = _NOT_XML.sub("", request["prompt"])  # a zero would end it in an mp4
    return Metadata(xmp=_packet(title), title=title, comment=comment)


def read_request(path: Path) -> dict[str, Any]:
    """Returns the request that a sample's file, its folder of pictures, or its JSON contains.

    Raises:
        UserError: there is none.
    """
    return read_sample(path)[0]


def read_sample(path: Path) -> tuple[dict[str, Any], str | None]:
    """Returns the request of `read_request`, and the dtype that the sample was computed in, None where not recorded."""
    if path.suffix.lower() == ".json":
        content: Any = read_json(path)
    else:
        try:
            metadata = read_metadata(path)
            content = json.loads(metadata.comment) if metadata and metadata.comment else None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    request = content.get(REQUEST) if isinstance(content, dict) else None
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise UserError(f"{path} does not contain how it was made: give a video that sample.py wrote, or its JSON file")
    made_with = content.get("made_with")
    dtype = (made_with if isinstance(made_with, dict) else content).get("dtype")
    return request, dtype if dtype in DTYPES else None
