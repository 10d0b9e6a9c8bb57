"""A page on which people make videos, and an HTTP interface to the same queue: `python -m lavie_jax.app`.

    page.py       the page, in Gradio              api.py       HTTP requests and answers in JSON
    views.py      its status, results and gallery  server.py    one server for both
    generation.py what a person asks for           uploads.py   limits of files, and their kinds
    jobs.py       the queue                        store.py     jobs and their files on disk
    engine.py     the models, and one job          progress.py  share and time left of a job

Only `page.py` and `server.py` need Gradio, and only `engine.py` needs jax.
"""
