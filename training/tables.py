"""Tables of texts, for the command line and for Markdown."""

from training import recipe, results
from training.model import build, parameter_count


def percent(fraction: float) -> str:
    """A fraction in percent, with two decimals."""
    return f"{100 * fraction:.2f} %"


def table_rows() -> list[list[str]]:
    """The registry as rows of texts, a header first: each recipe, its report and what we reached."""
    reached = results.read()
    rows = [["recipe", "report", "parameters", "reported", "reached on test"]]
    for name in recipe.names():
        chosen = recipe.load(name)
        report = chosen.report
        rows.append(
            [
                name,
                report.system if report else "ours",
                f"{parameter_count(build(chosen.model)):,}",
                f"{percent(report.accuracy)} ({report.measured})" if report else "",
                results.summary(reached, chosen.digest()),
            ]
        )
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of texts, the first a header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
