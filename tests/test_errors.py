"""What a person reads after a mistyped name."""

import pytest

from lavie_jax.errors import UserError, suggest


def test_a_typo_gets_the_nearest_name_and_all_allowed_ones():
    assert suggest("dddim", ["euler", "ddpm", "ddim"]) == "; did you mean 'ddim'? Allowed: ddim, ddpm, euler"


def test_a_name_like_none_gets_the_allowed_ones_only():
    assert suggest("heun", ["ddpm", "ddim"]) == ". Allowed: ddim, ddpm"


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="steps"):
        raise UserError("steps is 0; give 1 or more")
