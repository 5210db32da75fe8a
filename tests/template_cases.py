"""Templates the tests of ``edge.template`` run: the language, provenance, and what must be stopped."""
# ruff: noqa: E501  (one template a line)

from __future__ import annotations

#: One line each, rendered by Jinja and by us; both must give the same text, or both refuse.
PIECES = """
{{ messages[0].content }}|{{ messages[0]['content'] }}|{{ messages[0].get('content') }}|{{ messages[0].nothing }}
{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }}{% endfor %}
{% for m in messages if m.role == 'user' %}{{ m.role }}{{ loop.length }}{% else %}none{% endfor %}
{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0]|dictsort }}
{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}
{% set ns = namespace(n=0, none=none) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.none }}
{% macro f(a, b='B', c=a) %}[{{ a }}{{ b }}{{ c }}{{ y }}]{% endmacro %}{% set y = 5 %}{{ f(1) }}{{ f(1, c=2) }}{{ f() }}
{% macro g() %}({{ caller('q') }}){% endmacro %}{% call(z) g() %}{{ z }}{{ z }}{% endcall %}
{% macro h() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ h(1, 'a', k=2) }}
{% set b %}<{{ messages[0].content }}>{% endset %}{{ b|upper }}{% filter upper %}abc{% endfilter %}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}
{{ 'a' ~ 1 ~ none ~ true ~ [1, 'x'] ~ {'k': 'v'} ~ (1,) ~ 1.5 }}{{ [none, true, 'é', "it's"] }}
{{ 1 + 2 * 3 - 4 / 2 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ -3 }}{{ 1 < 2 < 3 }}{{ not 1 }}{{ 0 or 'x' }}{{ 1 and 2 }}
{{ 'abc'[1] }}{{ 'abc'[-1] }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ [1, 2, 3][1:] }}{{ 'abc'[9] }}{{ 'abc'.nope }}
{{ messages[0].content[0] }}{{ messages[0].content[-2:] }}{{ messages[0].content|first }}{{ messages[0].content|last }}
{{ messages[0].content|length }}{{ messages[0].content|list }}{{ messages[0].content|reverse }}
{{ ' a b '|trim }}{{ 'xax'|trim('x') }}{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a b c'.split(' ', 1) }}
{{ 'a b c'.rsplit(None, 1) }}{{ 'a\\nb\\r\\nc'.splitlines() }}{{ 'a-b'.partition('-') }}{{ 'aXbX'.rpartition('X') }}
{{ '%s is %d and %5.1f%%' % ('x', 3, 2.5) }}{{ '%s'|format('y') }}{{ '{} {1} {k!r:>5}'|string }}{{ '{}-{k}'.format(1, k='z') }}
{{ 'abc'.replace('b', 'X') }}{{ 'abab'|replace('a', 'c', 1) }}{{ 'abc'.find('c') }}{{ 'abc'.startswith(('x', 'a')) }}
{{ 'hello world-a'|title }}{{ 'heLLo'|capitalize }}{{ 'a'.upper() }}{{ 'ab'.center(7, '*') }}{{ 'ab'.ljust(4) }}{{ 'ab'.rjust(4) }}|
{{ 'ab'|center(9) }}{{ 'a\\nb\\n\\nc'|indent }}{{ 'a\\nb'|indent(2, true) }}{{ 'a b c'|wordcount }}{{ '<&">'|e }}
{{ [3, 1, 2]|sort }}{{ ['b', 'A']|sort }}{{ ['b', 'A']|sort(case_sensitive=true, reverse=true) }}{{ [1, 1, 2]|unique|list }}
{{ messages|map(attribute='role')|join(', ') }}{{ messages|map('length')|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ messages|rejectattr('role', 'eq', 'user')|map(attribute='content')|list }}{{ [1, 2, 3, 4]|select('even')|list }}{{ [0, 1]|reject|list }}
{% if messages|selectattr('role', 'eq', 'nobody') %}lazy values are true{% endif %}{% if [] %}no{% endif %}
{{ [1, 2]|sum }}{{ [1, 5, 2]|max }}{{ ['b', 'A']|min }}{{ -2|abs }}{{ 2.567|round(1) }}{{ '7'|int + 1 }}{{ 'x'|int(3) }}{{ '1.5'|float }}
{{ nothing }}{{ nothing|default('d') }}{{ ''|default('d', true) }}{{ nothing is defined }}{{ none is none }}{{ nothing|length }}
{{ 1 is number }}{{ true is boolean }}{{ 'a' is string }}{{ [] is sequence }}{{ {} is mapping }}{{ 1 is iterable }}{{ 3 is odd }}
{{ 4 is divisibleby 2 }}{{ 'a' is in 'abc' }}{{ 1 in [1] }}{{ 'k' in {'k': 1} }}{{ 'x' not in 'abc' }}{{ 1 is eq 1 }}{{ true is true }}
{{ 'role' in messages[0] }}{{ messages[0].content in 'Hi there' }}{{ messages[0] == messages[0] }}{{ messages[0].content is string }}
{{ messages|tojson }}{{ messages[0]|tojson(indent=2) }}{{ 'é<'|tojson }}{{ 'é'|tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': [1.5, none, true]}|tojson }}
{{ range(3)|list }}{{ range(5, 1, -2)|list }}{{ range(3) }}{{ dict(a=1).a }}{{ 'a' * 3 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ 3 * 'b' }}
{{ 'x' if false }}{{ 'x' if true else 'y' }}{{ ('a', 'b')|join }}{{ {'items': 3}.items() }}{{ {'items': 3}['items'] }}{{ {'a': 1}|items|list }}
{% for a in [1, 2] %}{% for b in [3, 4] %}{{ loop.index }}{{ loop.depth }}{{ loop.previtem }}{{ loop.cycle('x', 'y') }}{% endfor %}{{ loop.changed(a) }}{% endfor %}
{%- if true -%} x {%- endif %} {%+ if true %} y{% endif %} {# gone #}{% raw %}{{ raw }}{% endraw %}{% generation %}g{% endgeneration %}
{{ messages[5] }}{{ messages[0].content.nothing }}{{ [1, 2].index(2) }}{{ [1, 1].count(1) }}{{ 'aXb'|lower|upper|trim('A') }}
{{ messages[9].role }}
{{ 'a' + 1 }}
{{ nothing.attribute }}
{{ messages[0].pop('role') }}
{{ [].append(1) }}
{{ f() }}
{{ 1|nofilter }}
{{ raise_exception('no') }}
""".strip().split("\n")

#: What an untrusted ``c`` may go through without becoming markup.
PASSING = [
        "c", "c|trim", "c.strip()", "c ~ ''", "c + ''", "c|upper", "c.lower()", "c|title", "c|string", "c|safe", "c[0:]",
        "c|list|join", "c|reverse", "c.split('|')|join('|')", "c|replace('x', 'y')", "c.replace('', '')", "c * 2", "'%s' % c",
        "'%r' % [c]", "'%30s' % c", "'{}'.format(c)", "'{:>30}'.format(c)", "c.format()", "[c]", "[c]|string", "{'k': c}",
        "{c: 1}", "[c]|join", "[[c]]|first|first", "c|tojson", "[c]|tojson", "messages|tojson(indent=2)", "c|indent",
        "c|center(30)", "c.center(40)", "c|e", "messages[0].values()|list", "messages[0].items()", "(c,)", "c|default('')",
        "c if true else ''", "c or ''", "messages|map(attribute='content')|join", "[c]|map('upper')|join", "[c]|sort|first",
        "[c, c]|unique|join", "[c]|max", "dict(a=c).a", "namespace(a=c).a", "c.partition('q')|join", "c.title()", "c|format",
        "c.splitlines()|join", "c.removeprefix('z')", "c.swapcase()", "messages[0]|dictsort|string", "c|first ~ c[1:]",
        "messages[0]|items|list", "c.casefold()", "[c]|select|join", "c.ljust(40)", "c|list", "''.join([c])", "c.join(['', c])",
]  # fmt: skip


def grow(what: str, by: str) -> str:
    return (
        f"{{% set ns = namespace(s={what}) %}}{{% for i in range(64) %}}{{% set ns.s = {by} %}}{{% endfor %}}"
    )


LAUGHS = grow("[1]", "[ns.s, ns.s]")
TWO_LAUGHS = "{% set a = namespace(s=[1]) %}{% set b = namespace(s=[1]) %}{% for i in range(64) %}"
TWO_LAUGHS += "{% set a.s = [a.s, a.s] %}{% set b.s = [b.s, b.s] %}{% endfor %}"
BIG = "{% set a = 'a' * 1000000 %}{% for i in range(100000) %}"

HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(100000) %}{% for j in range(100000) %}aaaaaaaa{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "multiply": "{{ 'a' * 500000000 }}",
    "multiply from left": "{{ 500000000 * 'a' }}",
    "multiply content": "{% for i in range(100000) %}{% set x = messages[0].content * 100000 %}{% endfor %}",
    "multiply list": "{{ [1] * 500000000 }}",
    "double by plus": grow("'aaaa'", "ns.s + ns.s"),
    "double by tilde": grow("'aaaa'", "ns.s ~ ns.s"),
    "double by join": grow("'aaaa'", "[ns.s, ns.s]|join"),
    "double by format": grow("'aaaa'", "'%s%s' % (ns.s, ns.s)"),
    "double by format method": grow("'aaaa'", "'{0}{0}'.format(ns.s)"),
    "double by block": "{% set ns = namespace(s='aaaa') %}{% for i in range(64) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
    "double list": grow("[1]", "ns.s + ns.s"),
    "center": "{{ 'a'.center(500000000) }}",
    "center filter": "{{ 'a'|center(500000000) }}",
    "ljust": "{{ 'a'.ljust(500000000) }}",
    "rjust": "{{ 'a'.rjust(500000000) }}",
    "zfill": "{{ 'a'.zfill(500000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(500000000) }}",
    "percent width": "{{ '%500000000d' % 1 }}",
    "percent star": "{{ '%*d' % (500000000, 1) }}",
    "percent precision": "{{ '%.500000000f' % 1 }}",
    "format width": "{{ '{:>500000000}'.format(1) }}",
    "format nested width": "{{ '{:>{w}}'.format(1, w=500000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 1000000)|replace('', 'b' * 100000) }}",
    "join": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join filter": "{{ range(100000)|join('a' * 100000) }}",
    "indent": "{{ ('a\\n' * 100000)|indent('b' * 100000) }}",
    "json indent": "{{ [1, 2]|tojson(indent=100000000) }}",
    "json separators": "{{ range(1000)|list|tojson(separators=['a' * 100000, 'b']) }}",
    "range": "{{ range(10 ** 12)|list }}",
    "batch": "{{ [1]|batch(500000000, 'x')|list }}",
    "slice": "{{ [1]|slice(500000000)|list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": grow("10", "ns.s * ns.s"),
    "big literal": "{{ " + "9" * 5000 + " }}",
    "big literal below the digit limit": "{{ " + "9" * 4000 + " }}",
    "long int": "{% set a = '1' * 1000000 %}{% for i in range(100000) %}{% set x = a|int(base=16) %}{% endfor %}",
    "long float": "{% set a = '1' * 1000000 %}{% for i in range(100000) %}{% set x = a|float %}{% endfor %}",
    "laughs printed": LAUGHS + "{{ ns.s }}",
    "laughs as text": LAUGHS + "{{ ns.s|string }}",
    "laughs as json": LAUGHS + "{{ ns.s|tojson }}",
    "laughs joined": LAUGHS + "{{ ns.s|join }}",
    "laughs formatted": LAUGHS + "{{ '%s' % [ns.s] }}",
    "laughs compared": TWO_LAUGHS + "{{ a.s == b.s }}",
    "laughs ordered": TWO_LAUGHS + "{{ a.s < b.s }}",
    "laughs tested": TWO_LAUGHS + "{{ a.s is eq b.s }}",
    "laughs found": TWO_LAUGHS + "{{ a.s in [b.s] }}",
    "laughs indexed": TWO_LAUGHS + "{{ [a.s].index(b.s) }}",
    "laughs counted": TWO_LAUGHS + "{{ [a.s].count(b.s) }}",
    "laughs sorted": TWO_LAUGHS + "{{ [a.s, b.s]|sort }}",
    "laughs unique": TWO_LAUGHS + "{{ [a.s, b.s]|unique|list }}",
    "laughs largest": TWO_LAUGHS + "{{ [a.s, b.s]|max }}",
    "laughs changed": TWO_LAUGHS + "{% for x in [a.s, b.s] %}{{ loop.changed(x) }}{% endfor %}",
    "laughs as key": grow("(1,)", "(ns.s, ns.s)") + "{{ {ns.s: 1} }}",
    "laughs asked": grow("(1,)", "(ns.s, ns.s)") + "{{ {}.get(ns.s) }}",
    "laughs in dict": grow("(1,)", "(ns.s, ns.s)") + "{{ dict([(ns.s, 1)]) }}",
    "laughs in error": grow("(1,)", "(ns.s, ns.s)") + "{{ raise_exception(ns.s) }}",
    "own namespace": "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a == [ns.a] }}{{ ns.a|tojson }}",
    "strings kept": grow("[]", "ns.s + ['a' * 1000000 ~ i]"),
    "strings kept in names": "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set x = 'a' * 1000000 ~ i %}"
    "{% set ns.l = ns.l + [x] %}{% endfor %}",
    "lists kept": grow("[]", "ns.s + [range(100000)|list]"),
    "characters": "{{ ('a' * 1000000)|list }}",
    "characters of content": "{% for i in range(9) %}{{ (messages[0].content * 100000)|list|length }}{% endfor %}",
    "split": "{% for i in range(1000) %}{% set x = ('a ' * 100000).split() %}{% endfor %}",
    "splitlines": "{{ ('ab\\u2028' * 300000).splitlines()|length }}",
    "sort": "{% for i in range(1000) %}{% set x = range(99999)|sort %}{% endfor %}",
    "count": BIG + "{% set x = a.count('aab') %}{% endfor %}",
    "find": BIG + "{% set x = 'ab' in a %}{% endfor %}",
    "compare": "{% set b = 'a' * 1000000 %}" + BIG + "{% set x = a == b %}{% endfor %}",
    "case": BIG + "{% set x = a|upper %}{% endfor %}",
    "slices": "{% set l = range(100000)|list %}{% for i in range(100000) %}{% set x = l[:] %}{% endfor %}",
    "arguments": "{% macro f() %}{{ varargs }}{% endmacro %}{% for i in range(99) %}{{ f(*range(100000)) }}{% endfor %}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "strftime long": "{{ strftime_now('%Y' * 100000) }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep filters": "{{ 1" + "|abs" * 20000 + " }}",
    "deep plus": "{{ 1" + "+ 1" * 20000 + " }}",
    "deep attributes": "{{ messages" + ".a" * 20000 + " }}",
    "open tags": "{{" * 50000,
    "open comments": "{#" * 50000,
    "long": " " * 300_000,
    "class": "{{ ''.__class__.__mro__ }}",
    "class as item": "{{ ''['__class__'] }}",
    "class by filter": "{{ ''|attr('__class__') }}",
    "class by map": "{{ [['']]|map(attribute='0.__class__.__name__')|join }}{{ 1 + none }}",
    "class by format": "{{ '{0.__class__}'.format(1) }}",
    "globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "self": "{{ self.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "debug": "{% debug %}",
    "change messages": "{{ messages.append(1) }}",
    "change mapping": "{{ messages[0].update(a=1) }}",
}
