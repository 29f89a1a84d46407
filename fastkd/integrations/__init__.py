"""Distillation inside the trainers that people already have; each module needs the trainer that it is named after."""
