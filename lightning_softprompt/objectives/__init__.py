"""What training minimises: formulas on logits, scores and targets, which know no family and no method."""
