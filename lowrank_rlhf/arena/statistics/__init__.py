"""What the votes say: strengths with intervals, agreement between people, and biases. Pure functions of arrays."""
