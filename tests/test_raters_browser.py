"""The page of a study in headless Chromium, with simulated raters. Needs selenium, Chromium and its driver."""

import sqlite3
import threading

import numpy as np
import pytest

from lavie_jax.evaluation.raters.answers import FILE, Answers, read
from lavie_jax.evaluation.raters.report import make_report
from lavie_jax.evaluation.raters.server import StudyServer
from lavie_jax.evaluation.raters.study import METRICS, Design, prepare
from tests.browser import browsers, wait_for
from tests.test_raters import PROMPTS, SYSTEMS, write_system

pytestmark = pytest.mark.heavy
PHONE = (360, 640)


@pytest.fixture
def study(tmp_path):
    systems = {name: write_system(tmp_path / name, 10 * i) for i, name in enumerate(SYSTEMS)}
    return prepare(tmp_path / "study", systems, Design(title="A <b>study</b>", controls=2))


@pytest.fixture
def address(study):
    answers = Answers(study.folder / FILE, study.id)
    server = StudyServer(study, answers, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()
    answers.close()


@pytest.fixture
def open_page(address):
    with browsers(address, window=(1366, 800), phone_screen=PHONE) as (open_in_new_browser, _):
        yield open_in_new_browser


class Person:
    """A simulated rater, who sees only the page, and recognises the systems by a list of video addresses."""

    def __init__(self, browser, study, *, seed, keyboard):
        self.browser, self.study, self.keyboard = browser, study, keyboard
        self.rng = np.random.default_rng(seed)

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def run(self, script):
        return self.browser.execute_script(f"return {script}")

    def join(self, name):
        wait_for(lambda: self.find("#start")[0].is_displayed())
        self.find("#name")[0].send_keys(name)
        self.find("#name-form button")[0].click()

    def question(self):
        """The id of the question on the page, "" at the end, None between two."""
        if self.find("#finished")[0].is_displayed():
            return ""
        return self.run("!busy && current?.question")

    def answer(self, prefer):
        """Watches the videos and answers; returns the largest difference between the times of two videos."""
        question = wait_for(self.question)
        shown = [video.get_attribute("src").split("/")[-1].split(".")[0] for video in self.find("video")]
        times = "[...document.querySelectorAll('video')].map((video) => video.currentTime)"
        apart = [0.0]

        def ready():
            now = self.run(times)
            apart.append(max(now) - min(now))
            return self.run("current.watched")

        wait_for(ready)
        if len(shown) == 2:
            self.choose(shown, prefer)
        else:
            self.label(self.study.videos[shown[0]])
        wait_for(lambda: self.question() not in (question, None, False))
        return max(apart)

    def choose(self, shown, prefer):
        videos = [self.study.videos[id] for id in shown]
        if any(video.damaged for video in videos):
            better = [not video.damaged for video in videos].index(True)
        else:
            better = [video.system for video in videos].index(SYSTEMS[0])
            better = better if self.rng.random() < prefer else 1 - better
        if self.keyboard:
            self.press("\ue012" if better == 0 else "\ue014")  # the arrows
        else:
            self.find("#answers button")[better].click()

    def label(self, video):
        label = 0 if video.damaged else 2 if video.system == SYSTEMS[0] else int(self.rng.integers(2))
        for metric in METRICS:
            if self.keyboard:
                self.press(str(label + 1))
            else:
                self.find(f"input[name={metric.name}]")[label].click()
        if self.keyboard:
            self.press("\ue007")  # Enter
        else:
            self.find("#answers button")[0].click()

    def press(self, key):
        self.browser.switch_to.active_element.send_keys(key)


def test_simulated_raters_are_found_to_prefer_what_they_prefer(study, open_page):
    total, apart = len(study.questions), []
    for number in range(4):
        browser = open_page(phone=number % 2 == 0)
        person = Person(browser, study, seed=number, keyboard=number % 2 == 1)
        person.join(f"rater {number}")
        for step in range(total):
            apart.append(person.answer(prefer=0.9))
            if step == 3:  # comes back to the page
                browser.refresh()
        assert person.question() == ""
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert max(apart) < 0.2
    answers = read(study.folder / FILE, study.id)
    assert len(answers) == 4 * total and min(answer.seconds for answer in answers) > 0.4
    report = make_report(study, answers)
    assert not any(row["fails"] for row in report["raters"].values())
    assert report["tables"]["preference"][f"{SYSTEMS[0]} > {SYSTEMS[1]}"]["share"].low > 0.5
    smooth = report["tables"]["metrics"]["motion_smoothness"]["systems"]
    assert smooth[SYSTEMS[0]]["good"].value == 1 and smooth[SYSTEMS[1]]["good"].value == 0


def test_the_page_fits_a_phone_shows_markup_as_text_and_lets_a_rater_back(study, open_page):
    browser = open_page(phone=True)
    person = Person(browser, study, seed=0, keyboard=False)
    person.join("anna <i>")
    seen = set()
    for _ in range(len(study.questions)):
        question = wait_for(person.question)
        seen.add(person.find("#prompt")[0].get_attribute("textContent"))
        assert person.run("document.documentElement.scrollWidth") <= PHONE[0]
        if len(person.find("video")) == 2:  # both videos and the answers are on the screen at once
            bottom = person.find("#answers")[0].rect
            assert bottom["y"] + bottom["height"] <= PHONE[1]
        person.answer(prefer=1)
    assert seen == set(PROMPTS) and not person.find("#prompt img, h1 b, #count i")
    assert person.find("h1")[0].text == "A <b>study</b>"
    person.find("#review")[0].click()
    assert wait_for(person.question) == question and person.find("#answers button")[0].is_enabled()
    again = open_page()  # on another device
    person = Person(again, study, seed=0, keyboard=True)
    person.join("ANNA <I>")
    wait_for(lambda: person.find("#taken")[0].is_displayed())
    assert f"{len(study.questions)} of {len(study.questions)}" in person.find("#taken-text")[0].text
    person.find("#resume")[0].click()
    wait_for(lambda: person.find("#finished")[0].is_displayed())


def test_an_answer_is_sent_again_until_it_is_saved(study, open_page, monkeypatch):
    append, failures = Answers.append, []

    def fail_twice(*arguments):
        if len(failures) < 2:
            failures.append(1)
            raise sqlite3.OperationalError("database or disk is full")
        return append(*arguments)

    monkeypatch.setattr(Answers, "append", fail_twice)
    person = Person(open_page(), study, seed=0, keyboard=True)
    person.join("anna")
    person.answer(prefer=1)
    assert len(failures) == 2 and len(read(study.folder / FILE, study.id)) == 1
    assert not person.find("#message")[0].is_displayed()
