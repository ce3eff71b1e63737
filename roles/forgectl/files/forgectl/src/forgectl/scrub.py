"""Taking secrets out of text that leaves the host: by their value where it is known here, and by their shape.

A known value is looked for as it is and in every form that logs, URLs, JSON and shells give it; of a long one also the
half that is left where something cut it off. What has the shape of a secret, or stands under the name of one, goes
whether it is known or not: rather too much than too little.
"""

import base64
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import quote, quote_plus, unquote, urlsplit

# Shorter values are parts of ordinary words; and even shorter ones say nothing to anybody.
SHORTEST, SHORTEST_ANYWHERE = 4, 8
# What is no secret whatever it is the value of.
COMMON = frozenset(
    ["true", "false", "null", "none", "yes", "no", "localhost", "postgres", "postgresql", "production", "staging"]
)
# While a text is scrubbed, a mark in it is one character, which nobody uses and no secret can be found in.
_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD
_FOREIGN = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
# Of a value as long as this, a half of it is looked for as well.
HALVED = 24

# A name that ends like this has a secret behind it.
_NAME = r"""(?:pass(?:word|wd|phrase)?|pwd|secret(?:_?key)?|token|secret_?id|role_?id|accessor|api_?key|access_?key|
    private_?key|signing_?key|encryption_?key|credentials?|signature|cookie|dsn|authorization)"""
_FLAGS = re.IGNORECASE | re.VERBOSE
# What, and the pattern, of which a group `secret` goes, or all of it.
_SHAPES = (
    (
        "private key",
        re.compile(
            r"-----BEGIN\ [A-Z0-9 ]*PRIVATE\ KEY-----(?P<secret>.*?)(?:-----END\ [A-Z0-9 ]*PRIVATE\ KEY-----|\Z)",
            re.DOTALL | re.VERBOSE,
        ),
    ),
    ("password of a URL", re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^/\s:@\"']*:(?P<secret>[^/\s@\"']+)@")),
    # https://developer.hashicorp.com/vault/docs/concepts/tokens#token-prefixes; OpenBao issues the short form.
    ("Vault token", re.compile(r"(?<![\w.-])(?:hv[sbr]\.[\w-]{20,}|[sr]\.[A-Za-z0-9]{24}(?![\w.-])|b\.[\w-]{60,})")),
    ("GitHub token", re.compile(r"\b(?:gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{50,})")),
    ("Slack token", re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/(?P<secret>[\w/-]+)")),
    ("AWS key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("JSON web token", re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")),
    ("bearer token", re.compile(r"\b(?:bearer|basic)\ +(?P<secret>[\w.~+/-]{8,}=*)", _FLAGS)),
    (
        "header",
        re.compile(
            r"\b(?:proxy-)?authorization|\b(?:set-)?cookie|\bx-(?:api-key|auth-token|vault-token)", re.IGNORECASE
        ),
    ),
    (
        "parameter of a URL",
        re.compile(
            r"(?:[?&]|%3F|%26)(?:[\w.-]{0,60}"
            + _NAME
            + r"|key|sig|code|auth|jwt|session|sid)(?:=|%3D)(?P<secret>(?:(?!%26)[^&\s\"'\\])+)",
            _FLAGS,
        ),
    ),
    (
        # In quotes it goes to its end, whatever is in it.
        "value under such a name",
        re.compile(
            r"(?<![A-Za-z0-9])[\w.-]{0,60}"
            + _NAME
            + r"\\?[\"']?\ *[:=]\ *\\?(?P<quote>[\"'])(?P<secret>(?:(?!(?P=quote))[^\r\n\\]){3,})",
            _FLAGS,
        ),
    ),
    (
        "value under such a name",
        re.compile(
            r"(?<![A-Za-z0-9])[\w.-]{0,60}"
            + _NAME
            + r"\\?[\"']?\ *[:=]\ *(?:\\?[\"'])?(?P<secret>[^\s\"'&;,<>\\}\]]{3,})",
            _FLAGS,
        ),
    ),
    (
        "value under such a name",
        re.compile(r"^\s*(?:export\ )?[A-Z0-9_]*_KEY\s*=\s*[\"']?(?P<secret>[^\s\"']{3,})", re.MULTILINE | re.VERBOSE),
    ),
)
# The rest of a header, after its name.
_HEADER_VALUE = re.compile(r"\\?[\"']?\s*[:=]\s*(?:\\?[\"'])?(?P<secret>[^\"'\r\n\\]+)")


def forms(value: str) -> list[str]:
    """A value in every form that it may be met in, longest first."""
    raw = value.encode()
    found = {
        value,
        *(quote(value, safe=safe) for safe in ("", "/", "/:@")),
        quote_plus(value),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        html.escape(value),
        base64.b64encode(raw).decode().rstrip("="),
        base64.urlsafe_b64encode(raw).decode().rstrip("="),
        raw.hex(),
        # As Nginx and systemd write what is no plain character.
        re.sub(r"[^ !#-\[\]-~]", lambda char: "".join(f"\\x{byte:02X}" for byte in char[0].encode()), value),
        re.sub(r"[^ !#-\[\]-~]", lambda char: "".join(f"\\x{byte:02x}" for byte in char[0].encode()), value),
    }
    found |= {re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), each) for each in found}
    return sorted((each for each in found if each.strip()), key=len, reverse=True)


def parts(value: str) -> Iterator[str]:
    """A value, and what of it is a secret by itself: its lines, the password of a URL and what follows its host."""
    yield value
    lines = [line.strip() for line in value.splitlines()]
    if len(lines) > 1:
        yield from (line for line in lines if len(line) >= SHORTEST_ANYWHERE)
    if "://" in value:
        try:
            url = urlsplit(value.strip())
            secrets = [url.password or "", unquote(url.password or ""), url.query, url.path.strip("/")]
        except ValueError:
            return
        if url.scheme.startswith("http"):
            # Of a hook the path is the secret, and a log may have a part of it.
            secrets += [each for each in url.path.split("/") if len(each) >= 2 * SHORTEST_ANYWHERE]
        else:
            # The path is the name of a database.
            secrets.pop()
        yield from (each for each in secrets if len(each) >= SHORTEST)


class Scrubber:
    """Takes secrets out of texts, and counts what it took, by label.

    `values` are value: label of what is known; `public` is what is no secret even where it is one of them, or stands
    under the name of one.
    """

    def __init__(self, values: Mapping[str, str], public: Iterable[str] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.too_short: list[str] = []
        self._public = COMMON | {each for each in public if each}
        known: dict[str, str] = {}
        for value, label in values.items():
            for part in parts(value):
                part = _FOREIGN.sub("\ufffd", part)
                if part.strip() in self._public or not part.strip():
                    continue
                if len(part) < SHORTEST:
                    self.too_short.append(label)
                else:
                    known.setdefault(part, label)
        self._forms: dict[str, str] = {}
        for value in sorted(known, key=len, reverse=True):
            for form in forms(value):
                self._forms.setdefault(form, known[value])
        # One may contain another.
        self._forms = dict(sorted(self._forms.items(), key=lambda item: -len(item[0])))
        self._halves = {value: label for value, label in known.items() if len(value) >= HALVED}
        labels = dict.fromkeys(known.values())
        labels |= dict.fromkeys(f"part of {label}" for label in labels) | dict.fromkeys(label for label, _ in _SHAPES)
        self._marks = {label: chr(_FIRST_MARK + number) for number, label in enumerate(labels)}
        self._written = {ord(char): mark(label) for label, char in self._marks.items()}
        # Of others than these nobody knows what they are: what looks like a mark may have a secret in it.
        self._read = {mark(label): char for label, char in self._marks.items()}
        self._marked = re.compile("|".join(map(re.escape, self._read)))

    def __call__(self, text: str) -> str:
        """The text without them; marks that it has already stay whole."""
        text = self._folded(text)
        for form, label in self._forms.items():
            text = self._without(text, form, label)
        for value, label in self._halves.items():
            text = self._without_halves(text, value, label)
        for label, pattern in _SHAPES:
            text = self._without_headers(text, pattern) if label == "header" else pattern.sub(self._mask(label), text)
        return text.translate(self._written)

    def leak(self, text: str) -> str:
        """The label of a known value that a text still has beside its marks, or nothing."""
        text = self._folded(text)
        return next((label for form, label in self._forms.items() if self._holds(text, form)), "")

    def _folded(self, text: str) -> str:
        """The text with a character for each mark."""
        return self._marked.sub(lambda found: self._read[found[0]], _FOREIGN.sub("\ufffd", text))

    def _without(self, text: str, form: str, label: str) -> str:
        if len(form) >= SHORTEST_ANYWHERE:
            found = text.count(form)
            if found:
                self.counts[label] += found
                text = text.replace(form, self._marks[label])
            return text
        if form not in text:
            return text
        text, found = _word(form).subn(self._marks[label], text)
        self.counts[label] += found
        return text

    def _holds(self, text: str, form: str) -> bool:
        return form in text and (len(form) >= SHORTEST_ANYWHERE or bool(_word(form).search(text)))

    def _without_halves(self, text: str, value: str, label: str) -> str:
        """Take out what begins or ends like a long value, as far as it goes on being it."""
        half = len(value) // 2
        for piece, backwards in ((value[:half], False), (value[-half:], True)):
            while (at := text.find(piece)) >= 0:
                begin, end = at, at + half
                while not backwards and end < len(text) and value.startswith(text[begin : end + 1]):
                    end += 1
                while backwards and begin > 0 and value.endswith(text[begin - 1 : end]):
                    begin -= 1
                self.counts[label] += 1
                text = text[:begin] + self._marks[f"part of {label}"] + text[end:]
        return text

    def _without_headers(self, text: str, pattern: re.Pattern[str]) -> str:
        pieces, at = [], 0
        for name in pattern.finditer(text):
            value = _HEADER_VALUE.match(text, name.end())
            if value is None or name.start() < at or _FOREIGN.match(value["secret"]):
                continue
            pieces += [text[at : value.start("secret")], self._marks["header"]]
            self.counts["header"] += 1
            at = value.end("secret")
        return "".join([*pieces, text[at:]])

    def _mask(self, label: str) -> Callable[[re.Match[str]], str]:
        def masked(found: re.Match[str]) -> str:
            whole, secret = found[0], found.groupdict().get("secret") or found[0]
            if secret in self._public or (_FOREIGN.search(secret) and not re.search(r"\w", secret)):
                return whole
            self.counts[label] += 1
            begin = found.start("secret") - found.start() if found.groupdict().get("secret") else 0
            return whole[:begin] + self._marks[label] + whole[begin + len(secret) :]

        return masked


def mark(label: str) -> str:
    """What stands in the place of a secret."""
    return f"<scrubbed: {label}>"


def _word(form: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])")
