"""The run-time type checker that jaxtyping applies to lavie_jax in tests."""

from beartype import BeartypeConf, beartype

# int where float is annotated is right in Python (PEP 484, numeric tower).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
