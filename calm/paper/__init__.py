"""The paper's tables and figures: `bench` measures, `experiments` gathers, `report` draws."""
