"""The paper's tables and figures: `experiments` measures on a `bench`,
`sections` draws.
"""
