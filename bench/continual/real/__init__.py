"""The study on a real pretrained model: one task at a time, matched learning, general loss on texts no method saw."""
