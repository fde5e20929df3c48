"""What a pair of models costs on given GPUs: memory, time and tokens per second, by arithmetic alone.

    gpus        what a GPU can do                   shapes      what a model consists of
    memory      what a rank holds of it             passes      how long one forward pass takes
    acceptance  tokens of a chain                   tree        which drafts the target agrees with
    rounds      drafting, then verifying            simulate    both at once: tokens, and who does what when
    schedules   the times of the three schedules    search      the best way to draft on each
    transfers   reading prompts elsewhere: when that pays

Seconds, bytes and tokens everywhere; nothing is measured here. How far to trust it: `deploy/sizing.md`.
"""
