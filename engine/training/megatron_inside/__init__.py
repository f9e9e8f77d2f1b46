"""What runs in the learner's ranks, and knows Megatron. Whatever is imported from here finds Megatron prepared."""

import engine.training.megatron_inside.start  # noqa: F401
