"""How processes share the work of `jaxgpt prepare`, whatever it is; stages/ says what is done.

    plan.py          the pieces of a source as units, written down in a work folder
    work_folder.py   what is done, and who does what: claims, summaries, the loop over a stage's tasks
    crew.py          the processes that work through the stages, and the progress bar

A stage begins when the one before it is done, and its tasks depend on what earlier stages left, never on who
did them: any number of processes gives the same bytes.
"""
