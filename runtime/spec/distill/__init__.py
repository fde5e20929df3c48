"""Train a drafter to imitate a target, also in the grouped form that layer-parallel drafting runs it in."""
