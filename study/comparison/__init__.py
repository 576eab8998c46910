"""The paper's comparison on tasks small enough for two cores: ``python -m study``.

``plan.py`` and ``ablations.py`` define the runs, ``stages.py`` their order; ``runs.py`` runs them, ``records.py`` keeps
a small file of each in study/records, ``cost.py`` measures a step. ``results.py`` reads the records; ``paper.py`` has
the paper's figures and compares orders; ``findings.py``, ``cost_page.py``, ``page.py`` and ``plots.py`` make
docs/study.md. The study and ``python -m study.compare`` share ``program.py``.
"""
