"""What is known about a stream: as data, as text, as figures."""

from lightning_odem.report.changes_figure import plot_changes
from lightning_odem.report.conclusions import conclude
from lightning_odem.report.figures import plot_accuracy_matrix, plot_accuracy_over_stream, plot_path
from lightning_odem.report.merge_record import MergeRecord, RemovalRecord
from lightning_odem.report.record import StreamReport
from lightning_odem.report.search_figure import plot_search
from lightning_odem.report.tables import render_costs, render_summary, render_table
from lightning_odem.report.writer import save

__all__ = [
    "MergeRecord",
    "RemovalRecord",
    "StreamReport",
    "conclude",
    "plot_accuracy_matrix",
    "plot_accuracy_over_stream",
    "plot_changes",
    "plot_path",
    "plot_search",
    "render_costs",
    "render_summary",
    "render_table",
    "save",
]
