"""What the pre-training scripts share: data, encoders, schedule, evaluation and the run directory."""
