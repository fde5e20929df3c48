"""How ranks cooperate: meshes, collectives, and who holds which part of a model. Never imports
``runtime``."""
