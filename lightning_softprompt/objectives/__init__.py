"""What training minimises: formulas on logits, scores and targets, which know no family, no soft position and no method."""
