"""What looks at whole graphs: Inductor's pass, recomputation, exact counts."""
