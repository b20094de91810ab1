"""For mkdocs: a link to a file of the repository that is no page becomes its name."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)([^)\s]+)\)", _as_name, markdown)


def _as_name(match: re.Match[str]) -> str:
    text, path = match[1], match[2]
    return text if path in text else f"{text} (`{path}`)"
