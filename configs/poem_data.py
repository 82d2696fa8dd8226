"""Make the poet's data: python -m corpora.poems --poems=chinese-poetry-2.0.1.tgz"""

config = dict(
    poems="",  # the npm package chinese-poetry, as .tgz or unpacked, or a clone of its repository
    out="data/poems/rows",  # gets poems.jsonl, heldout.jsonl, verse.json, the rows of the tasks and source.json
    overwrite=False,  # replace what was made before from other poems or settings
    held_out=0.035,  # share of the titles whose poems are kept for evaluation
    seed=0,  # of the tasks
)
