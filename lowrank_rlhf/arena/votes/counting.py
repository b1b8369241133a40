"""How many of what, in words; imported to parse the command line, so it imports nothing."""


def counted(count: int, one: str, many: str = "") -> str:
    """
    >>> counted(1, "vote"), counted(2, "person", "people")
    ('1 vote', '2 people')
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def told(counts: dict[str, int]) -> str:
    """The counts of a store in one line.

    >>> told({"votes": 3, "pair": 2, "thumb": 1, "comparisons": 2, "repeats": 1, "superseded": 1})
    '3 votes (2 pairs, 1 thumb) on 2 comparisons, 1 of them a repeat; 1 more superseded or taken back'
    """
    names = {"pair": "pair", "ranking": "ranking", "thumb": "thumb", "better": "better answer"}
    kinds = ", ".join(counted(counts[kind], name) for kind, name in names.items() if counts.get(kind))
    votes, comparisons = counted(counts["votes"], "vote"), counted(counts["comparisons"], "comparison")
    said = f"{votes} ({kinds or 'none'}) on {comparisons}"
    repeats = counts["repeats"]
    said += f", {repeats} of them {'a repeat' if repeats == 1 else 'repeats'}" if repeats else ""
    return said + (f"; {counts['superseded']} more superseded or taken back" if counts["superseded"] else "")
