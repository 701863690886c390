"""The lab: notebooks run strictly, their pages and findings, sweeps, JupyterLab, the state of this installation."""

from aprlab.lab.notebooks import (
    NotebookError,
    Step,
    check_types,
    find_notebook,
    index_page,
    notebook_names,
    read_step,
    reports_folder,
    run_notebook,
    section,
    walk,
    write_findings,
)

__all__ = [
    "NotebookError",
    "Step",
    "check_types",
    "find_notebook",
    "index_page",
    "notebook_names",
    "read_step",
    "reports_folder",
    "run_notebook",
    "section",
    "walk",
    "write_findings",
]
