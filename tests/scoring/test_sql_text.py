"""cllm.scoring.sql_text: SQL is extracted from chatty replies."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.scoring.sql_query import is_query
from cllm.scoring.sql_text import extract_sql, lexemes, without_distinct

Q = "SELECT count(*) FROM singer"


@pytest.mark.parametrize(
    "reply",
    [
        Q,
        f"{Q};",
        f"  {Q} ;\n",
        f"SQL: {Q}",
        f"**SQL:** {Q}",
        f"SQL query:\n{Q};\n",
        f"```sql\n{Q};\n```",
        f"```SQL\n{Q}\n```\nThis query counts the singers.",
        f"```\n{Q}\n```",
        f"```sql {Q}```",
        f"```{Q}```",
        f"~~~sql\n{Q}\n~~~",
        f"Sure! To select all singers from the table:\n\n```sqlite\n{Q}\n",
        f"First a look at Python:\n```python\nprint(1)\n```\nand then\n```sql\n{Q};\n```",
        f"```sql\n{Q};\n```\nor\n```sql\nSELECT count(id) FROM singer;\n```",
        f"The query is `{Q}`, which counts.",
        f"Here is the SQL query that you need: {Q};",
        f"I would write {Q}",
        f"{Q};\n\nThis query selects the number of singers. Don't worry.",
        f"{Q}; It counts them.",
        f"{Q}; With this you get the number.",
        f"{Q}\n\nExplanation: `count(*)` counts.",
        f"{Q}\nThis query counts the singers.",
        f"{Q}\n### Instruction:\nHow old are they?\n### Response:\nSELECT age FROM singer",
        f"{Q}\n\n\nQuestion: And the songs?\nSELECT count(*) FROM song",
        f"{Q}\n</s>",
        f"{Q}\n<|EOT|>",
        f"{Q}\n```\nThat is all.",
        f"{Q};\n-- the end; really",
        f'The SQL query is "{Q}".',
        f'"{Q}". It is called "counting".',
        f"'{Q}'",
        f"'{Q};'",
        f"**{Q}**",
        f"**{Q};** This counts.",
        f"*{Q}*.",
        f"<sql>{Q}</sql>",
        f"<sql> {Q} </sql> and so on",
        f"The query is {Q}.",
        f"{Q}. This query counts the singers.",
        f"Answer: Select the names from the table:\n{Q}",
        f"Select all singers, and count them:\n\n{Q}",
        f"Select the number of singers.\n\n{Q}",
        f"<think>SELECT name FROM singer? No.</think>\n{Q}",
        f"SELECT name FROM singer? No.\n</think>\n\n```sql\n{Q}\n```",
        f"{Q}<|eot_id|>SELECT name FROM singer",
        f"{Q}</s></s>",
        f"{Q}<|im_end|>\n<|im_start|>user\nThanks",
        f"```sql\n{Q};\n```<|endoftext|>",
        f"{Q};\n\nProblem: And the songs?\nSELECT count(*) FROM song",
        f"{Q};\n-- Question: And the songs?\nSELECT count(*) FROM song",
        f"Question: How many singers are there?\nSQL: {Q}",
        f'{{"query": "{Q}"}}',
        f'```json\n{{"query": "{Q};", "tables": ["singer"]}}\n```',
        f'{{"reason": "Select from singer: all", "SQL": "{Q}"}} is the query.',
        f'[{{"sql": "{Q}"}}]',
        f"{{'sql': '{Q}'}}",
        f'{{"sql": "{Q}',
        '{"answer": "```sql\\nSELECT count(*) FROM singer\\n```"}',
        f"I would run {Q} to get their number.",
        f"Run {Q}, which counts them.",
        f"With {Q} you get the number.",
        f"{Q} gives the number of singers",
        f"Try {Q} and see how many there are.",
        f"I use that query ({Q}) for the number.",
        f"({Q})",
    ],
)
def test_sql_is_extracted(reply: str) -> None:
    assert extract_sql(reply) == Q


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name\nFROM singer\nWHERE age > 20\n  AND country = 'France'",
        "SELECT\n  *\nFROM\n  singer",
        "SELECT name\n\nFROM singer\n\nORDER BY age",
        "SELECT a FROM t\nUNION\n\nSELECT b FROM u",
        "SELECT name FROM singer WHERE song = 'a;b\n\nThis is it' AND x = \"c;d\"",
        "SELECT name FROM (\n\nSELECT * FROM singer\n\n)",
        "SELECT name -- the name; really\nFROM singer",
        "WITH t AS (SELECT 1) SELECT * FROM t",
        "WITH RECURSIVE t(x) AS (SELECT 1) SELECT * FROM t",
        "select name from singer where a = 'it''s'",
        "SELECT 1",
        "SELECT T1.name , T1. Age FROM singer AS T1",
        "SELECT name FROM singer WHERE song = 'The end. It is'",
    ],
)
def test_queries_are_not_truncated(query: str) -> None:
    assert extract_sql(query) == query
    assert extract_sql(f"```sql\n{query};\n```\nThis is it.") == query


@pytest.mark.parametrize(
    "reply",
    [
        f"{Q}; {Q}",
        f"{Q};\n-- and\nDROP TABLE singer",
        f"{Q};\n\nINSERT INTO singer VALUES (1);",
        f"DROP TABLE singer; {Q}",
        f"```sql\n{Q};\n{Q};\n```",
    ],
)
def test_several_statements_are_all_kept(reply: str) -> None:
    sql = extract_sql(reply)
    assert sql.count("singer") == 2 and ";" in sql


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM singer WHERE song = 'to be' AND x = \"y\"",
        "SELECT a,\n  b\nFROM t\nORDER BY a DESC",
        "SELECT 'it''s' FROM t",
        "SELECT a FROM t WHERE b > (SELECT avg(b) FROM t)",
        "select max(a), b from t",
        "select a from t where b in (select b from u)",
    ],
)
def test_queries_in_json_and_sentences_are_not_truncated(query: str) -> None:
    assert extract_sql(json.dumps({"sql": query})) == query
    assert extract_sql(json.dumps({"calls": [{"name": "run", "arguments": json.dumps({"query": query})}]})) == query
    assert extract_sql(f"The query is: {query} so that you see them.") == query
    assert extract_sql(f"I would use {query} to get them.") == query


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM singer GROPU BY name",
        "SELECT name FROM singer WHERE age = 1 to WHERE x = 2",
        "SELECT name FROM to all",
        "(SELECT name FROM singer) UNION (SELECT name FROM song)",
    ],
)
def test_wrong_queries_stay_wrong(query: str) -> None:
    assert not is_query(extract_sql(query))


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_inside_quotes(quote: str) -> None:
    query = f"SELECT name FROM singer WHERE song = {quote}Hey You{quote} AND age = 1"
    assert extract_sql(f"I say: {quote}{query}{quote}.") == query


@pytest.mark.parametrize(
    "reply",
    ["", "   ", "I do not know.", "With this in mind, select a row.", "Now select one from the list.", "```python\nx\n```", ";",
     f"<think>{Q}", f"</s>{Q}"],
)  # fmt: skip
def test_replies_without_sql(reply: str) -> None:
    assert extract_sql(reply) == ""


def test_distinct_is_removed_outside_quotes() -> None:
    query = "SELECT DISTINCT count(distinct a), 'DISTINCT', \"distinct\", distincts FROM t -- DISTINCT"
    assert without_distinct(query) == "SELECT  count( a), 'DISTINCT', \"distinct\", distincts FROM t -- DISTINCT"


@given(st.text(alphabet="aS;'\"`-/*\n ()[]:#", max_size=40))
def test_lexemes_join_to_the_text(text: str) -> None:
    assert "".join(lexemes(text)) == text
    assert extract_sql(f"{Q} {text}").startswith(Q)


@pytest.mark.parametrize(
    "reply",
    ["`" * 99_999, "select " * 20_000, "SELECT " * 20_000, "WITH a AS " * 9000, "/*" * 30_000, f"{Q};" + "/*/" * 30_000,
     "CREATE TEMP " * 9000, "'" * 50_001, f"{Q};" + "\n -- " * 9000, "SELECT\n\n" * 9000, "WITH" + " " * 50_000,
     "*SELECT" + " *" * 20_000 + "a", "'SELECT" + "'" * 30_000 + "a", ":SELECT x" * 4000 + ":", ">SELECT" + "<" * 30_000,
     "SELECT 1" + " ." * 15_000, "[" * 90_000, '{"a":' * 20_000, '["' * 40_000, "SELECT 1 " + "(" * 30_000,
     "SELECT a FROM b to the " * 2000],
)  # fmt: skip
def test_long_replies_are_fast(reply: str) -> None:
    start = time.process_time()
    extract_sql(reply)
    assert time.process_time() - start < 5
