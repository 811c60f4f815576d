"""Hypothesis strategies."""

import random

from hypothesis import strategies as st

from effkernels import backends
from effkernels.ops._cases import Case, cases_for


def drawn_cases(backend: str) -> st.SearchStrategy[Case]:
    """Any case of any phase op that `backend` has kernels for."""
    kinds = sorted({type(c) for c in cases_for(backend) if c.drawn(random.Random(0))}, key=lambda kind: kind.__name__)
    cases = st.builds(lambda kind, numbers: kind.drawn(numbers), st.sampled_from(kinds), st.randoms())
    return cases.filter(lambda case: case.dtype in backends.DTYPES[backend])
