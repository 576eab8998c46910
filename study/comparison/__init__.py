"""The paper's comparison on tasks that two cores can do: ``python -m study``.

``plan.py`` and ``ablations.py`` say what is run, ``stages.py`` in which order, ``runs.py`` runs it, ``records.py``
keeps a small file of each run in study/records, ``cost.py`` measures a step. ``results.py`` reads the records,
``paper.py`` has the paper's own figures and compares orders, ``findings.py``, ``cost_page.py``, ``page.py`` and
``plots.py`` make docs/study.md of them. ``program.py`` is what the study and ``python -m study.compare`` share.
"""
