"""Turns raw videos into training shards, after LaVie's Vimeo25M (sec. 4.1): `python -m lavie_jax.curation`.

A module imports only modules to its left:
`inputs`, `filters`, `scenes`, `duplicates`, `models` (measurements) -> `video` (one file), `isolation` (processes) ->
`job`, `output` (a run's settings and folder), `statistics` -> `assemble` (shards) -> `latent_encoder`, `report` ->
`pipeline` (all videos), `images` -> `beam_duplicates`, `beam_steps` -> `beam` (all videos, on many machines).
"""
