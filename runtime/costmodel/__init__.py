"""What a pair of models costs on given GPUs: memory, time and tokens per second, by arithmetic alone.

    gpus        what a GPU can do                   shapes      what a model consists of
    memory      what a rank holds of it             passes      how long one forward pass takes
    acceptance  tokens of a round                   rounds      drafting and verifying, and the best way to
    transfers   reading prompts elsewhere: when that pays

Seconds, bytes and tokens everywhere; nothing is measured here. How far to trust it: `deploy/sizing.md`.
"""
