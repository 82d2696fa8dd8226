"""What web_demo.py serves: generation behind a queue, OpenAI's JSON, the checkpoints under a folder, a page."""
