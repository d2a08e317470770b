"""`gemma-sweep`: many exports of one model, measured, and the best of them under constraints."""
