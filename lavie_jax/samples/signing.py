"""Signed statements that a file is generated: C2PA manifests (c2pa.org), by c2pa-python, given a certificate.

Metadata (`provenance.py`) is a statement that anybody can write or remove. A manifest is signed, and bound to the
pictures: programs that read it show who signed it, and whether the file was changed since. It can be removed too.
"""

import dataclasses
import io
import json
from pathlib import Path

import lavie_jax
from lavie_jax.errors import UserError, suggest, user_path
from lavie_jax.samples.provenance import GENERATED_SOURCE

ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
MIME = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
_PROBE = bytes.fromhex(  # a png of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738"
    "550000000049454e44ae426082"
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What files are signed with.

    Attributes:
        chain: the certificates in PEM, the signer's first; C2PA requires one that another one has issued.
        key: the signer's private key in PEM (PKCS 8).
        algorithm: one of `ALGORITHMS`, which follows from the key.
    """

    chain: str
    key: str = dataclasses.field(repr=False)
    algorithm: str = "es256"

    @classmethod
    def read(cls, chain: str | Path, key: str | Path, algorithm: str = "es256") -> "Certificate":
        """Reads two PEM files, and signs a picture as a trial.

        Raises:
            UserError: a file cannot be read, the two do not belong together, or c2pa-python is missing.
        """
        if algorithm not in ALGORITHMS:
            raise UserError(f"c2pa-algorithm: unknown {algorithm!r}{suggest(algorithm, ALGORITHMS)}")
        texts = []
        for name, path in (("c2pa-certificate", user_path(chain)), ("c2pa-key", user_path(key))):
            try:
                texts.append(path.read_text(encoding="ascii"))
            except (OSError, ValueError) as error:
                raise UserError(f"{name}: {path} cannot be read as a PEM file: {error}") from None
        certificate = cls(*texts, algorithm)
        certificate.signed(_PROBE, "image/png", "trial")
        return certificate

    def sign(self, path: Path) -> None:
        """Adds a manifest to an mp4, gif or png file, or to each picture in a folder. npz files cannot have one.

        Raises:
            UserError: the file cannot be signed.
        """
        for file in sorted(path.glob("*.png")) if path.is_dir() else [path]:
            if file.suffix in MIME:
                file.write_bytes(self.signed(file.read_bytes(), MIME[file.suffix], file.name))

    def signed(self, content: bytes, mime: str, name: str) -> bytes:
        """Returns the content of a file with a manifest; `name` is for errors."""
        try:
            import c2pa
        except ImportError:
            raise UserError("c2pa-certificate: signing needs c2pa-python: pip install 'lavie_jax[c2pa]'") from None
        manifest = {
            "claim_generator_info": [{"name": "lavie_jax", "version": lavie_jax.__version__}],
            "format": mime,
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED_SOURCE}]},
                }
            ],
        }
        signed = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.chain.encode(), self.key.encode(), None)
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(json.dumps(manifest)) as builder:
                builder.sign(signer, mime, io.BytesIO(content), signed)
        except (c2pa.C2paError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"c2pa-certificate: {name} cannot be signed with it by {self.algorithm}: {reason}; give a certificate "
                "for signing documents or e-mail with the chain above it, its key, and --c2pa-algorithm"
            ) from None
        return signed.getvalue()
