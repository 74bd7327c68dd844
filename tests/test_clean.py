"""Each rule with what it takes and what it leaves; and the whole: its files, its report, its end."""

import gzip
import os
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import refusal
from ulimi import clean, cli
from ulimi.clean import (
    RULES,
    Duplicates,
    Statistics,
    capitals,
    characters,
    choose_rules,
    clean_files,
    foreign,
    hyphens,
    index,
    parted,
    plan_cleaning,
    replaced,
    run_plan,
    spaced,
    spaces,
    speakers,
    tables,
)


def count(*lines):
    statistics = Statistics()
    for line in lines:
        statistics.add(line)
    for line in lines:
        statistics.add_apart(line)
    return statistics


def cleaned(tmp_path, lines, **options):
    """Clean lines through a file, and give the lines that come out."""
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    clean_files([source], [target], choose_rules(**options), tmp_path / "report.tsv")
    return target.read_bytes().decode().split("\n")[:-1]


def unescape(text):
    return text.replace("\\\\", "\0").replace("\\t", "\t").replace("\\r", "\r").replace("\0", "\\")


def apply_report(lines, report, name):
    """Apply a report's rows to lines, knowing nothing of how they came about."""
    result = dict(enumerate(lines, start=1))
    rows = report.read_bytes().decode().split("\n")
    assert rows[0].split("\t") == ["file", "line", "rule", "action", "before", "after"]
    assert rows[-1] == ""
    for row in rows[1:-1]:
        file, number, rule, action, before, after = row.split("\t")
        if file != name:
            continue
        assert rule in RULES
        assert result[int(number)] == unescape(before)
        if action == "removed":
            del result[int(number)]
        else:
            result[int(number)] = unescape(after)
    return list(result.values())


# One line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Sawubona\u00a0mhlaba", "Sawubona mhlaba"),
        ("uku\u00adfunda", "ukufunda"),
        ("\ufeffIncwadi\u200b yami", "Incwadi yami"),
        ("Ama\uf0b7phuzu\x07", "Ama phuzu "),
        ("Cafe\u0301", "Café"),
        ("ukudla\tnamanzi", "ukudla namanzi"),
        ("“I-HIV” – yebo, e-Goli ’98… ḽ", "“I-HIV” – yebo, e-Goli ’98… ḽ"),
    ],
)
def test_characters(before, after):
    assert characters(before) == after


@pytest.mark.parametrize(("before", "after"), [("  Siya  hamba   manje \r", "Siya hamba manje"), ("Siya hamba", None)])
def test_spaces(before, after):
    assert spaces(before) == (before if after is None else after)


def test_lines_with_lost_letters_go():
    assert replaced("Ngiyab\ufffdnga") == ""
    assert replaced("Ngiyabonga ?") == "Ngiyabonga ?"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[ikhasi 12 umugqa 3 ukuya ikhasi 13 umugqa 4]", ""),
        ("[ Ikhasi 7 umgqa 1- umugqa 9] Siyaqala.", "Siyaqala."),
        ("Yathi [page 3] yahamba", "Yathi   yahamba"),
        ("(c) Inkampani Yethu (Pty) Ltd Ikhasi 7 Imithetho yomdlalo", "Imithetho yomdlalo"),
        ("Page 8 (c) Inkampani Yethu (Pty) Ltd Ukudlala kulula", "Ukudlala kulula"),
        ("Ikhasi 9", ""),
        ("↑ Umbhali, isihloko (2010)", ""),
        ("Retrieved on June 30, 2003.", ""),
        ("Bheka ikhasi 12 encwadini yakho.", None),
        ("Ikhasi 12 likhuluma ngamanzi.", None),
        ("[Uhleko] Ikhasi lami", None),
        ("Retrieved ulwazi ngo-June 30", None),
    ],
)
def test_index(before, after):
    assert index(before) == (before if after is None else after)


@pytest.mark.parametrize(
    "line",
    [
        "12 345 | 67",
        "* * * a",
        "Isingeniso .......... 12",
        "----- Isiqephu -----",
        "R2 Imishini R5 Imishini R10 Imishini",
    ],
)
def test_tables_go(line):
    assert tables(line) == ""


@pytest.mark.parametrize(
    "line",
    [
        "Wazalwa ngo-1994 eGoli.",
        "Ngicabanga ukuthi........ cha",
        "Ucingo: (011) 555-0123 noma 0800 555 012 ebusuku nasemini, buza uThemba.",
        "Ngo 7 ku 9 sidlala",
        "2014 singunyaka.",
        "1 & 2 Amakhosi",
    ],
)
def test_tables_leaves_sentences(line):
    assert tables(line) == line


def test_letters_that_stand_apart():
    assert spaced("N j e n g o ba manje") == ""
    assert spaced("Izigaba A, B, C, D, E, F no-G") != ""
    assert spaced("UJ F K M uthi") != ""


@pytest.mark.parametrize(("line", "goes"), [
    ("UKUVIKELWA KWEMVELO 2010", True),
    ("I-SABC", True),
    ("I-SABC ikhuluma", False),
    ("Amanzi", False),
    ("2010 - 2011", False),
])  # fmt: skip
def test_capitals(line, goes):
    assert capitals(line) == ("" if goes else line)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("MNU J M DLAMINI: Siyabonga.", "Siyabonga."),
        ("MRS T ZONDI : (Minister of Water): Yebo.", "Yebo."),
        ("ISIKHULUMI: Thulani!", "Thulani!"),
        ("THE DEPUTY SPEAKER: Hlala phansi.", "Hlala phansi."),
        ("[isikhulumi?] Kunjalo.", "Kunjalo."),
        ("IBHONASI: Thatha konke", None),
        ("UKWAHLUKANA KUHLE: bonke bayakwazi", None),
        ("Mnu Dlamini: ngiyabonga", None),
        ("INKOSI uBhekuzulu: indaba yakhe", None),
        ("MNU J M DLAMINI wathi: yebo", None),
    ],
)
def test_speakers(before, after):
    assert speakers(before) == (before if after is None else after)


# Lines against the text

ZULU = [
    "Abantwana bayafunda esikoleni ngoba uthisha ubafundisa kahle.",
    "Umlimi uhlakula amabele ensimini yakhe ekuseni.",
    "Sizohamba siye edolobheni ukuze sithenge ukudla.",
    "Kodwa abantu abaningi bayasebenza emasimini abo.",
] * 5


@pytest.mark.parametrize(
    "line",
    [
        "The children are walking to school with their teacher.",
        "We must all go home now.",
        "Ke a leboga ka gore le re thusa ka di puku tsa rona.",
    ],
)
def test_foreign_lines_go(line):
    assert foreign(line, count(*ZULU, line)) == ""


@pytest.mark.parametrize(
    "line",
    [
        *ZULU[:4],
        "Siyabonga!",
        "Thank you!",
        "Kodwa thank you very much for that.",
        "Uthe: what is this and how are you, wase ehleka kakhulu.",
        "Wafunda i-University of the West ngo-1990.",
        "See the i-Department of the West and you.",
        "Hhayi ke nje, ye!",
    ],
)
def test_own_lines_and_mixed_lines_stay(line):
    assert foreign(line, count(*ZULU, "i-IFP ne-ANC i-ANC ne-IFP", line)) == line


def test_english_text_keeps_its_english():
    lines = ["The dog is in the house with you.", "They are on the road to the town.", "Umuntu uhamba endleleni yakhe."]
    statistics = count(*lines)
    assert [foreign(line, statistics) for line in lines] == lines


def test_text_of_short_words_keeps_them():
    lines = ["Ke a leboga ka gore le re thusa ka di puku tsa rona.", "O a di rata ka gore ke tsa ka le tsa bona."]
    statistics = count(*lines)
    assert [foreign(line, statistics) for line in lines] == lines


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Uthanda okunempi- lo.", "Uthanda okunempilo."),
        ("ukudla khu -la manje", "ukudla khula manje"),
        ("Khu- la mntwana", "Khula mntwana"),
        ("bafane-lekile impela", "bafanelekile impela"),
        ("abane i -HIV", "abane i-HIV"),
        ("wafika nge- 2010 lapha", "wafika nge-2010 lapha"),
        ("la e- Goli", "la e-Goli"),
        ("base- Ningizimu", "baseNingizimu"),
        ("kodwa -ke", "kodwa-ke"),
        # What belongs as it is.
        ("ngihlala e-Goli no-Themba", None),
        ("nge-2010 kuya ku-2012", None),
        ("amakhasi 10-12 no 10 - 12", None),
        ("uThemba - umfowethu - ufikile", None),
        ("kodwa-ke", None),
        ("i-apula elimnandi", None),
        ("okunempi - lo", None),
        ("umama -ubaba", None),
        ("i-imeyili", None),
        ("thenga- thengisa", None),
        ("umama- bethu", None),
        ("umama- Bheki", None),
        ("kuku- Dlamini", None),
        ("ku-khanya", None),
        ("uma-apula", None),
        ("njalo-ke", None),
    ],
)
def test_hyphens(before, after):
    statistics = count(
        "okunempilo okunempilo khula khula bafanelekile bafanelekile iapula iapula iimeyili iimeyili kodwake kodwake",
        "i-HIV i-HIV nge-2009 nge-2011 e-Goli e-Durban kodwa-ke kodwa-ke kodwa-ke umama ubaba umama ubaba umamaubaba",
        "thenga thengisa umama-bethu umamabethu",
        "baseNingizimu baseNingizimu baseNingizimu base-Goli base-Goli kukuDlamini kukuDlamini",
        "ku-2012 ku-2013 kukhanya kukhanya umaapula umaapula njaloke njaloke",
    )
    assert hyphens(before, statistics) == (before if after is None else after)


def test_a_hyphen_that_the_text_prefers_stays():
    often = count("inqubo-mgomo inqubo-mgomo inqubomgomo inqubomgomo")
    seldom = count("inqubo-mgomo inqubomgomo inqubomgomo")
    assert hyphens("inqubo-mgomo", often) == "inqubo-mgomo"
    assert hyphens("inqubo-mgomo", seldom) == "inqubomgomo"


APART = [
    *["sifuna ukuhamba ezindaweni zethu lomsebenzi njengoba uhulumeni uthi"] * 4,
    *["yebo nje ngani ngoba lokhu kunje ngoba kunjalo nje ngoba kunjani"] * 3,
]


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("sifuna uku hamba namhlanje", "sifuna ukuhamba namhlanje"),
        ("Uku hamba, ezinda weni.", "Ukuhamba, ezindaweni."),
        ("ezinda weni", "ezindaweni"),
        ("lo msebenzi muhle", None),  # both spellings are right
        ("kunje ngoba nje ngoba", None),  # words in their own right
        ("uku Hamba", None),
        ("KU hamba", None),
        ("uku hamba-ke", None),
        ("ezinda, weni", None),
        ("ezinda  weni", None),
    ],
)
def test_parted(line, after):
    assert parted(line, count(*APART, line)) == (line if after is None else after)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("nje ngoba", ["njengoba"] * 60 + ["yebo nje", "ngoba yebo"] * 20),  # they meet by chance
        ("izi nja", ["izinja"] * 5 + ["izi nja"]),  # parted nearly as often
        ("izi nja", ["izinja"] * 3 + ["izi yebo nja yebo"] * 2),  # the pieces stand alone as often
        ("uku Hamba", ["ukuhamba"] * 9 + ["uku hamba"]),
        ("UKU hamba", ["ukuhamba"] * 9 + ["uku hamba"]),
    ],
)
def test_the_evidence_for_a_joined_word_must_be_strong(line, text):
    assert parted(line, count(*ZULU * 9, *text, line)) == line


def test_a_rare_word_is_joined_where_its_piece_is_no_word():
    rare = "bathi uzophu mula kusasa"
    assert parted(rare, count(*APART, "uzophumula", rare)) == "bathi uzophumula kusasa"
    assert parted(rare, count(*APART, rare)) == rare, "never seen as one word"
    assert parted(rare, count(*APART, "uzophumula mula uzophu", rare)) == rare, "both pieces are words"
    assert parted(rare, count(*APART * 40, "uzophumula", rare)) == "bathi uzophumula kusasa"
    assert parted(rare, count(*APART * 40, *["bathi uzophu"] * 120, "uzophumula", rare)) == rare, "one is a common word"
    long = "bathi sizophumu lisana kusasa"
    assert parted(long, count(*APART, "sizophumulisana", long)) == long, "neither is short"


def test_three_pieces_are_not_joined_at_once():
    statistics = count(*["aba ba ntu"], *["ababa bantu"] * 9)
    assert parted("aba ba ntu", statistics) == "ababa ntu"


def test_duplicates():
    rule = Duplicates()
    long = "Abantwana bayafunda esikoleni ngoba uthisha ukhona."
    assert [rule(line) for line in (long, "Siyabonga.", long, "Siyabonga.", long + " ")] == [
        long, "Siyabonga.", "", "Siyabonga.", long + " ",
    ]  # fmt: skip


# Choice of rules


def test_rules_are_chosen_in_their_order():
    assert choose_rules() == tuple(RULES)
    assert choose_rules(only=["parted", "spaces"]) == ("spaces", "parted")
    assert set(RULES) - set(choose_rules(keep=["capitals", "index"])) == {"capitals", "index"}


def test_unknown_rules_are_refused():
    assert "did you mean 'hyphens'" in refusal(lambda: choose_rules(keep=["hyphen"]))
    assert "there are characters, spaces" in refusal(lambda: choose_rules(only=["x"]))
    assert "both" in refusal(lambda: choose_rules(["index"], ["spaces"]))


def test_each_rule_can_be_applied_alone(tmp_path):
    lines = [
        "a\u00a0b", "a  b", "a\ufffdb", "Ikhasi 9", "1 2 3 a", "N j e n g o ba", "AMANZI", "ISIKHULUMI: Yebo.",
        "The dog is in the house with you.", "okunempi- lo okunempilo", *ZULU[:4], *["sihamba manje"] * 4, "siha mba",
        ZULU[0],
    ]  # fmt: skip
    for rule in RULES:
        result = cleaned(tmp_path, lines, only=[rule])
        rules_seen = {row.split("\t")[2] for row in (tmp_path / "report.tsv").read_text().splitlines()[1:]}
        assert rules_seen == {rule}
        assert result != lines
        assert cleaned(tmp_path, lines, keep=list(RULES)[:]) == lines


# Files

DIRTY = [
    *ZULU[:4],
    "",
    "   ",
    "UMLIMI",
    "Aba ntwana bayafu nda nge- 2010,  i -HIV\u00a0nge-2010 i-HIV nge-2011 i-TB.",
    "abantwana abantwana bayafunda bayafunda Abantwana",
    "MNU T ZULU: Abantwana\tbayafu- nda\\.",
    ZULU[1],
    "Thank you very much for this.",
]


def test_the_report_is_what_was_done(tmp_path):
    result = cleaned(tmp_path, DIRTY)
    assert apply_report(DIRTY, tmp_path / "report.tsv", str(tmp_path / "in.txt")) == result
    assert result[4:] == [
        "",
        "",
        "Abantwana bayafunda nge-2010, i-HIV nge-2010 i-HIV nge-2011 i-TB.",
        "abantwana abantwana bayafunda bayafunda Abantwana",
        "Abantwana bayafunda\\.",
    ]


def test_counts_agree_with_the_report(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n".join(DIRTY) + "\n", encoding="utf-8")
    counts = clean_files([source], [tmp_path / "b.txt"], tuple(RULES), tmp_path / "report.tsv")
    rows = [row.split("\t") for row in (tmp_path / "report.tsv").read_text(encoding="utf-8").split("\n")[1:-1]]
    assert list(counts) == list(RULES)
    for rule in RULES:
        mine = [row for row in rows if row[2] == rule]
        assert counts[rule].changed == len({row[1] for row in mine if row[3] == "changed"})
        assert counts[rule].removed == sum(row[3] == "removed" for row in mine)
    gone = sum(len(line) + 1 for line in DIRTY) - len((tmp_path / "b.txt").read_text(encoding="utf-8"))
    assert sum(count.chars for count in counts.values()) == gone


def test_a_line_that_a_rule_changes_in_two_rounds_counts_once(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n".join([*ZULU, *["ababa bantu ababantu"] * 9, "aba ba ntu"]) + "\n", encoding="utf-8")
    counts = clean_files([source], [tmp_path / "b.txt"], ("parted",))
    assert (tmp_path / "b.txt").read_text().split("\n")[-2] == "ababantu"
    assert (counts["parted"].changed, counts["parted"].chars) == (1, 2)


def test_cleaning_is_the_same_every_time(tmp_path):
    once = cleaned(tmp_path, DIRTY)
    report = (tmp_path / "report.tsv").read_bytes()
    assert cleaned(tmp_path, DIRTY) == once
    assert (tmp_path / "report.tsv").read_bytes() == report


PIECES = st.sampled_from(
    ["uku", "hamba", "ba", "ntu", "bantu", "ukuhamba", "i", "HIV", "nge", "2010", "the", "and", "you", "are", "lo",
     "MNU", "T", "ZULU:", "Ikhasi", "7", "[ikhasi 7]", ".....", "-", "- ", " -", " ", "  ", "\u00a0", "\u00ad", "é",
     "e\u0301", "\t", "\\", "\r", ",", ".", "’", "a", "\ufffd", "\uf03d", "↑"]
)  # fmt: skip
LINES = st.lists(st.lists(st.tuples(PIECES, st.sampled_from(["", " "])).map("".join), max_size=8).map("".join))


@settings(max_examples=150, deadline=None)
@given(LINES, st.sets(st.sampled_from(list(RULES))))
def test_cleaned_text_is_clean_and_the_report_exact(tmp_path_factory, lines, kept):
    folder = tmp_path_factory.mktemp("clean")
    lines = [line.rstrip("\r") for line in lines]  # "\r\n" would end the line
    once = cleaned(folder, lines, keep=sorted(kept))
    assert apply_report(lines, folder / "report.tsv", str(folder / "in.txt")) == once
    once = [line.rstrip("\r") for line in once]
    assert cleaned(folder, once, keep=sorted(kept)) == once


def test_statistics_are_of_all_files(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    a.write_text("\n".join(["uku hamba namhlanje", *ZULU[:4]]) + "\n", encoding="utf-8")
    b.write_bytes(gzip.compress(b"ukuhamba ukuhamba ukuhamba\nukuhamba\n"))
    plan = plan_cleaning([a, b], tmp_path / "out")
    run_plan(plan, tuple(RULES))
    assert (tmp_path / "out" / "a.txt").read_text().split("\n")[0] == "ukuhamba namhlanje"
    assert (tmp_path / "out" / "b.txt").read_text() == "ukuhamba ukuhamba ukuhamba\nukuhamba\n"


def test_a_file_of_which_nothing_is_left_is_written_empty(tmp_path):
    (tmp_path / "a.txt").write_text("AMANZI\n")
    (tmp_path / "b.txt").write_text("")
    run_plan(plan_cleaning([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out"), tuple(RULES))
    assert (tmp_path / "out" / "a.txt").read_bytes() == (tmp_path / "out" / "b.txt").read_bytes() == b""


def test_of_a_folder_the_training_text_alone_is_cleaned(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").write_text(f"AMANZI {part.upper()}\nAmanzi  {part}\n")
    (folder / "valid.txt").rename(folder / "valid.txt.bak")
    (folder / "valid.txt.gz").write_bytes(gzip.compress(b"AMANZI\n"))
    run_plan(plan_cleaning([folder], tmp_path / "out"), tuple(RULES))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.txt", "train.txt", "valid.txt.gz"]
    assert (tmp_path / "out" / "train.txt").read_text() == "Amanzi train\n"
    for name in ("test.txt", "valid.txt.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_what_cannot_be_done_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Amanzi\n")
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("")
    assert "there is no such file" in refusal(lambda: plan_cleaning([tmp_path / "no.txt"], tmp_path / "b.txt"))
    assert "standard input" in refusal(lambda: plan_cleaning([type(text)("-")], tmp_path / "b.txt"))
    assert "is an input" in refusal(lambda: plan_cleaning([text], text, force=True))
    assert "is an input" in refusal(lambda: plan_cleaning([text], tmp_path, force=True))
    assert "is an input" in refusal(lambda: plan_cleaning([text], tmp_path / "b.txt", text, force=True))
    assert "--force" in refusal(lambda: plan_cleaning([text], tmp_path / "old.txt"))
    assert "--force" in refusal(lambda: plan_cleaning([text], tmp_path / "b.txt", tmp_path / "old.txt"))
    assert "no train.txt" in refusal(lambda: plan_cleaning([tmp_path / "empty"], tmp_path / "out"))
    assert "this is a file" in refusal(lambda: plan_cleaning([text, text], tmp_path / "old.txt"))
    assert "2 results" in refusal(lambda: plan_cleaning([text, tmp_path / "other" / "a.txt"], tmp_path / "out"))
    assert "2 results" in refusal(lambda: plan_cleaning([text], tmp_path / "b.txt", tmp_path / "b.txt"))
    assert "plain" in refusal(lambda: plan_cleaning([text], tmp_path / "b.txt.gz"))
    assert "this is a folder" in refusal(lambda: plan_cleaning([text], tmp_path / "b.txt", tmp_path / "empty"))
    assert plan_cleaning([text], tmp_path / "old.txt", force=True).cleaned == ((text, tmp_path / "old.txt"),)


def test_damaged_input_leaves_no_result(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Amanzi\n\xff\n")
    message = refusal(lambda: run_plan(plan_cleaning([tmp_path / "a.txt"], tmp_path / "b.txt"), tuple(RULES)))
    assert "line 2" in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# The command


def run_cli(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ulimi", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_pipe_cannot_be_cleaned(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert run_cli(monkeypatch, "corpus", "clean", tmp_path / "pipe", "--out", tmp_path / "out.txt") == 2
    assert "is read more than once to be cleaned, so it cannot be a pipe" in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    source = tmp_path / "in.txt"
    source.write_text("AMANZI\nAmanzi  amaningi\n")
    words = ("corpus", "clean", source, "--out", tmp_path / "out.txt", "--report", tmp_path / "r.tsv")
    assert not run_cli(monkeypatch, *words)
    printed = capsys.readouterr()
    rows = {row.split()[0]: row.split()[1:4] for row in printed.out.splitlines()}
    assert rows["rule"] == ["changed", "removed", "chars"]
    assert rows["capitals"] == ["0", "1", "7"]
    assert rows["spaces"] == ["1", "0", "1"]
    assert "in.txt -> " in printed.err
    assert (tmp_path / "out.txt").read_text() == "Amanzi amaningi\n"
    assert run_cli(monkeypatch, *words) == 2
    assert "is there already" in capsys.readouterr().err
    assert not run_cli(monkeypatch, *words, "--force", "--only", "spaces")
    assert (tmp_path / "out.txt").read_text() == "AMANZI\nAmanzi amaningi\n"
    assert list({row.split()[0] for row in capsys.readouterr().out.splitlines()} & set(RULES)) == ["spaces"]


def test_the_help_names_every_rule_and_what_stays(monkeypatch, capsys):
    assert not run_cli(monkeypatch, "corpus", "clean", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(rule in text for rule in RULES)
    assert "valid.txt and test.txt are copied" in text


def test_every_rule_has_its_function():
    assert [name for name, _ in clean._functions(tuple(RULES), Statistics())] == list(RULES)
    assert Counter(name for name, _ in clean._functions(("parted", "spaces"), Statistics())) == {
        "spaces": 1,
        "parted": 1,
    }
