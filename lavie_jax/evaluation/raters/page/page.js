"use strict";
// The page of a study: asks one question after the other. All texts are set as text, never as markup.

const $ = (id) => document.getElementById(id);
const SAME_TIME = 0.06; // seconds by which two videos may differ
const PAUSE = 600; // milliseconds between two passes

let study, token, current, player, started; // `started`: when the videos of this question first played
let busy = false;

// ---- the server ----

class Refusal extends Error {
  constructor(status, content) {
    super(content.error || "The server refused the request.");
    Object.assign(this, { status, content });
  }
}

/** Sends a request; repeats it until the server answers, so that no answer is lost to a weak network. */
async function call(path, body) {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
    try {
      const options = body && { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
      const response = await fetch(path, options || {});
      const content = await response.json();
      if (response.ok) return show_message(""), content;
      if (response.status < 500) throw new Refusal(response.status, content);
    } catch (error) {
      if (error instanceof Refusal) throw error;
    }
    show_message("The server does not answer. Trying again; please keep this page open.");
    await new Promise((done) => setTimeout(done, wait));
  }
}

function show_message(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

/** Runs one action at a time, and shows why it was refused. */
async function act(action) {
  if (busy) return;
  busy = true;
  try {
    await action();
  } catch (error) {
    if (error.status === 403) return forget();
    show_message(error.message);
  } finally {
    busy = false;
  }
}

// ---- videos in step ----

/** Plays videos together, again and again; the shorter one waits at its last frame for the other. */
class Player {
  constructor(videos, watched, failed) {
    Object.assign(this, { videos, watched, failed, passes: 0, stopped: false, playing: false });
    for (const video of videos) {
      video.addEventListener("ended", () => this.ended());
      video.addEventListener("error", () => this.stopped || failed());
      video.addEventListener("waiting", () => this.follow());
    }
    this.timer = setInterval(() => this.follow(), 150);
    this.begin();
  }

  stop() {
    this.stopped = true;
    clearInterval(this.timer);
    clearTimeout(this.again);
    for (const video of this.videos) {
      video.pause();
      video.removeAttribute("src");
      video.load();
    }
  }

  /** Starts a pass when all videos can play. */
  async begin() {
    clearTimeout(this.again);
    this.playing = false;
    for (const video of this.videos) {
      video.pause();
      if (video.currentTime > 0) video.currentTime = 0;
    }
    // Phones that save data load nothing before play(): hence the limit.
    for (let wait = 0; wait < 100 && !this.stopped; wait++) {
      if (this.videos.every((video) => video.readyState >= 3 && !video.seeking)) break;
      await new Promise((done) => setTimeout(done, 30));
    }
    if (this.stopped) return;
    try {
      await Promise.all(this.videos.map((video) => video.play()));
      this.playing = true;
      started = started || performance.now();
    } catch (error) {
      // Phones that save power play only after a tap.
      if (error.name === "NotAllowedError") show_message("Tap “Replay” to play.");
    }
  }

  toggle() {
    show_message("");
    this.begin();
  }

  /** Keeps the videos at the same time: whoever is ahead waits. Continues what a browser paused in a hidden tab. */
  follow() {
    if (!this.playing) return;
    const running = this.videos.filter((video) => !video.ended);
    if (running.length < 2) return void running.forEach((video) => video.paused && this.resume(video));
    const [behind, ahead] = [...running].sort((a, b) => a.currentTime - b.currentTime);
    if (ahead.currentTime - behind.currentTime > SAME_TIME) ahead.pause();
    else this.resume(ahead);
    this.resume(behind);
  }

  resume(video) {
    if (video.paused && !video.ended) video.play().catch(() => {});
  }

  ended() {
    if (this.stopped || !this.playing || !this.videos.every((video) => video.ended)) return;
    this.playing = false;
    this.passes += 1;
    if (this.passes === 1) this.watched();
    this.again = setTimeout(() => this.begin(), PAUSE);
  }
}

// ---- screens ----

function show(screen) {
  for (const name of ["start", "ask", "finished"]) $(name).hidden = name !== screen;
  window.scrollTo(0, 0);
}

function element(tag, fields, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function forget() {
  localStorage.removeItem("rater-" + study.study);
  token = undefined;
  if (player) player.stop();
  player = undefined;
  for (const id of ["count", "bar"]) $(id).hidden = true;
  show("start");
}

async function join(resume) {
  $("taken").hidden = true;
  try {
    ({ token } = await call("/api/start", { name: $("name").value, resume }));
  } catch (error) {
    if (error.status !== 409) throw error;
    const { done, total } = error.content;
    $("taken-text").textContent = `A rater of this name has answered ${done} of ${total} questions.`;
    $("taken").hidden = false;
    return void $("resume").focus();
  }
  localStorage.setItem("rater-" + study.study, token);
  await ask();
}

async function ask(index) {
  show_question(await call("/api/question", { token, index }));
}

function show_question(question) {
  if (player) player.stop();
  player = started = undefined;
  current = question;
  $("count").textContent = `${question.name}: ${question.done} of ${question.total}`;
  Object.assign($("bar"), { max: question.total, value: question.done });
  for (const id of ["count", "bar"]) $(id).hidden = false;
  if (question.finished) return void show("finished");
  const pair = question.kind === "pair";
  $("ask").className = question.kind;
  $("videos").className = question.kind;
  $("prompt").textContent = question.prompt;
  $("task").textContent = pair ? "Which video is better?" : "How good is this video?";
  const videos = question.videos.map(({ url }) =>
    Object.assign(document.createElement("video"), { src: url, muted: true, playsInline: true, preload: "auto" }));
  $("videos").replaceChildren(...videos.map((video, i) => element("figure", {}, ...(pair ? [element("b", { textContent: "AB"[i] })] : []), video)));
  $("back").disabled = question.index === 0;
  $("metrics").hidden = pair;
  if (pair) show_choices(question);
  else show_metrics(question);
  if (question.answer) enable();
  show("ask");
  player = new Player(videos, enable, () => show_message("A video does not play here. “It does not play” skips it."));
}

function show_choices(question) {
  $("metrics").replaceChildren();
  $("answers").replaceChildren(...question.videos.map(({ id }, i) => {
    const key = element("kbd", { textContent: "←→"[i] });
    const button = element("button", { type: "button", disabled: true }, `${"AB"[i]} is better`, key);
    button.classList.toggle("chosen", question.answer?.better === id);
    button.addEventListener("click", () => send({ better: id }));
    return button;
  }));
}

function show_metrics(question) {
  $("metrics").replaceChildren(...study.metrics.map((metric) => {
    const labels = metric.labels.map((label, i) => {
      const input = element("input", { type: "radio", name: metric.name, value: label });
      input.checked = question.answer?.[metric.name] === label;
      input.addEventListener("change", check_complete);
      return element("label", {}, input, element("span", {}, label[0].toUpperCase() + label.slice(1), element("kbd", { textContent: i + 1 })));
    });
    const legend = element("legend", {}, metric.title, element("small", { textContent: metric.hint }));
    return element("fieldset", {}, legend, element("div", { className: "labels" }, ...labels));
  }));
  const next = element("button", { type: "button", className: "main", disabled: true }, "Next", element("kbd", { textContent: "Enter" }));
  next.addEventListener("click", () => send(chosen_labels()));
  $("answers").replaceChildren(next);
}

function chosen_labels() {
  return Object.fromEntries([...$("metrics").querySelectorAll("input:checked")].map((input) => [input.name, input.value]));
}

/** Allows an answer once the videos were seen to the end. */
function enable() {
  current.watched = true;
  if (current.kind === "pair") for (const button of $("answers").children) button.disabled = false;
  else check_complete();
}

function check_complete() {
  const complete = Object.keys(chosen_labels()).length === study.metrics.length;
  $("answers").firstChild.disabled = !(complete && current.watched);
}

function send(answer) {
  act(async () => {
    const seconds = started ? (performance.now() - started) / 1000 : 0;
    show_question(await call("/api/answer", { token, question: current.question, answer, seconds }));
  });
}

// ---- keys ----

function press(event) {
  if ($("ask").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key;
  if (key === "Backspace" || key === " ") {
    event.preventDefault();
    (key === " " ? $("replay") : $("back")).click();
  } else if (current.kind === "pair") {
    const side = { ArrowLeft: 0, a: 0, A: 0, ArrowRight: 1, b: 1, B: 1 }[key];
    if (side !== undefined) $("answers").children[side].click();
  } else if (key === "Enter") {
    event.preventDefault();
    $("answers").firstChild.click();
  } else if (/^[1-9]$/.test(key)) {
    label_by_number(Number(key) - 1);
  }
}

/** Sets the label of the metric that has the focus, else of the first without one, and goes on to the next. */
function label_by_number(number) {
  const sets = [...$("metrics").children];
  const focused = sets.findIndex((set) => set.contains(document.activeElement));
  const open = sets.findIndex((set) => !set.querySelector("input:checked"));
  const at = focused >= 0 ? focused : Math.max(open, 0);
  const input = sets[at].querySelectorAll("input")[number];
  if (!input) return;
  input.checked = true;
  check_complete();
  const following = sets[at + 1]?.querySelector("input:checked") || sets[at + 1]?.querySelector("input");
  if (following) following.focus();
  else document.activeElement.blur();
}

// ---- start ----

async function main() {
  document.addEventListener("keydown", press);
  $("name-form").addEventListener("submit", (event) => {
    event.preventDefault();
    act(() => join(false));
  });
  $("resume").addEventListener("click", () => act(() => join(true)));
  $("name").addEventListener("input", () => ($("taken").hidden = true));
  $("back").addEventListener("click", () => act(() => ask(current.index - 1)));
  $("review").addEventListener("click", () => act(() => ask(current.total - 1)));
  $("count").addEventListener("click", () => {
    if (confirm("Your answers are saved. Continue as another rater?")) forget();
  });
  $("replay").addEventListener("click", () => player && player.toggle());
  $("problem").addEventListener("click", () => {
    if (confirm("Skip this question because a video does not play?")) send({ problem: "a video does not play" });
  });
  study = await call("/api/study");
  $("title").textContent = document.title = study.title;
  for (const id of ["pairs", "singles"]) $(id).hidden = !study[id];
  token = localStorage.getItem("rater-" + study.study) || undefined;
  if (token) await act(() => ask());
  else show("start");
}

main();
