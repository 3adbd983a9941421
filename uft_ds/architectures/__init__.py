"""What is known of model families, and which models a run accepts."""
