"""The paper's tables and figures as functions: a model and prompts in, a frozen result out.

    tasks          prefix, lengths and metric of each task
    decode         prompts under any rule or grid -> records
    grids          thresholds from validation prompts
    scores         records -> quality, similarity to the full model, layers
    timing         measured seconds, settings in turn, prompt by prompt
    lengths        Table 1
    perturbations  Fig. 2a
    decay          Fig. 2b and 2c
    propagations   section 3.3.1: what skipped layers store
    tradeoff       Fig. 3, against layers and against seconds
    gains          Table 2: calibrated gains on unseen prompts
    validity       App. B: does the promise hold?
    trainings      two trainings side by side: App. D's classifiers, Eq. 6
    examples       Fig. 4: outputs with each token's layers
    claims         the paper's sentences beside what was measured here
    results        JSON of any result, and the cache that lets a report go on
    bench          decoding and timing of one task, each step cached
    suite          all experiments of one task

Every result is a frozen dataclass of plain numbers and texts; none knows of figures or pages
(`calm.paper.report` draws them).
"""
