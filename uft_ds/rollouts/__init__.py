"""Rollouts: answers of the policy to prompts, scored and recorded, which steps train on."""
