"""Raw videos to training shards: what LaVie's paper did for Vimeo25M (sec. 4.1), as `python -m lavie_jax.curation`.

`inputs` finds videos and the captions that are given, `segments` cuts videos into scenes, `filters` measures a scene,
`models` captions and scores it. `video` does all of this for one file and `pipeline` for all files, in parallel;
`assemble` finds near-duplicates and writes the shards, `report` shows what came out.
"""
