"""The import hook of conftest.py is on: public signatures are checked in every test."""

import jax.numpy as jnp
import jaxtyping
import pytest

from lavie_jax.models.attention import attention


def test_a_wrong_rank_is_refused():
    q = jnp.zeros((2, 3, 4, 8))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(q, q[0], q)


def test_axes_of_one_name_must_agree():
    q = jnp.zeros((2, 3, 4, 8))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(q, q, jnp.zeros((2, 3, 5, 8)))
