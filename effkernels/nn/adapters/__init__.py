"""Fused forms of other libraries' blocks: per library, one module with `CONVERTED`, from their classes to ours."""
