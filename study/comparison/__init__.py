"""The paper's comparison on a task that two cores can do: ``python -m study``.

``plan.py`` says what is run, ``runs.py`` runs it, ``cost.py`` measures a step, ``paper.py`` has the paper's own figures
and compares orders, ``page.py`` and ``plots.py`` make docs/study.md of the results.
"""
