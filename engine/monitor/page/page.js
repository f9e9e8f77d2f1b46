"use strict";
// Draws what the node sends (engine/monitor/snapshot.py has the fields). Everything that comes from a run, names
// included, becomes text nodes: nothing of it is ever parsed as HTML.

const RETRY_MS = 2000;
const RETRY_OVER_MS = 10000;
const QUIET_MS = 5000; // a live node says something every second
const REDRAW = ["curves", "staleness"]; // charts are drawn for a width
const DRAW = {
  head: drawHead, weights: drawWeights, pipeline: drawPipeline, rates: drawRates, teacher: drawTeacher,
  answers: drawAnswers, messages: drawMessages, curves: drawCurves, staleness: drawStaleness,
};

const state = {};
const connection = { source: null, isOpen: false, isOver: false, newsAt: 0, skew: 0, refusal: "" };

const $ = (id) => document.getElementById(id);
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }); // fits beside a chart
const number = (value) => (Number.isFinite(value) ? NUMBER.format(value) : "not finite");
const count = (value) => (Number.isFinite(value) ? COUNT.format(value) : "–");
const percent = (share) => `${Math.round(100 * share)}%`;
const fromTo = (first, last) => (first === last ? number(last) : `${number(first)} → ${number(last)}`);
const plural = (n, noun) => `${COUNT.format(n)} ${noun}${n === 1 ? "" : "s"}`;
const timeOfDay = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour12: false });

function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const shown = parts[0] ? parts : parts.slice(1);
  return shown.map((part, i) => (i ? String(part).padStart(2, "0") : String(part))).join(":");
}

function ago(seconds) {
  return seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function graphic(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function figures(id, entries) {
  $(id).replaceChildren(...entries.map(([value, words, className]) => element("span", className, element("b", "", value), ` ${words}`)));
}

// The connection

function connect() {
  const source = new EventSource("events");
  let wasOpen = false;
  connection.source = source;
  source.addEventListener("open", () => { wasOpen = true; });
  source.addEventListener("state", (event) => take(JSON.parse(event.data)));
  source.addEventListener("end", () => { connection.isOver = Boolean(state.head && state.head.is_over); });
  source.addEventListener("error", () => {
    source.close();
    connection.isOpen = false;
    if (!wasOpen && !connection.isOver) askWhy();
    setTimeout(connect, connection.isOver ? RETRY_OVER_MS : RETRY_MS);
    drawConnection();
  });
}

function take(news) {
  if (!connection.isOpen) connection.skew = -Infinity;
  Object.assign(state, news);
  Object.assign(connection, { isOpen: true, isOver: false, newsAt: Date.now(), refusal: "" });
  // The last line is up to a second old; the youngest one seen tells the time best, and clocks do not run backwards.
  if (news.head) connection.skew = Math.max(connection.skew, news.head.now - Date.now() / 1000);
  for (const name of Object.keys(news)) draw(name);
  drawConnection();
}

// What cannot be drawn must not take the rest away.
function draw(name) {
  try {
    DRAW[name]?.(state[name]);
  } catch (error) {
    console.error(name, error);
  }
}

// An EventSource does not tell the status of an answer that is no stream.
async function askWhy() {
  const asking = new AbortController();
  try {
    const answer = await fetch("events", { signal: asking.signal });
    connection.refusal = answer.ok ? "" : (await answer.text()).trim();
  } catch {
    connection.refusal = "";
  } finally {
    asking.abort();
    drawConnection();
  }
}

function drawConnection() {
  const silent = Date.now() - connection.newsAt;
  let kind = "live";
  let words = "live";
  if (connection.isOver) [kind, words] = ["over", "the run is over, this was its end"];
  else if (!connection.isOpen) {
    kind = connection.newsAt || connection.refusal ? "lost" : "connecting";
    words = connection.newsAt ? `disconnected, last seen ${ago(silent / 1000)} ago; trying again` : "connecting…";
  } else if (silent > QUIET_MS) [kind, words] = ["quiet", `no news for ${ago(silent / 1000)}`];
  document.body.dataset.link = kind;
  if ($("link").textContent !== words) $("link").textContent = words;
  drawNotice();
  drawTimes();
}

function drawNotice() {
  const head = state.head;
  let words = connection.refusal;
  if (!words && head?.phase === "failed") words = "The run has failed; the log at the end of this page says why. It can be continued with --resume.";
  if (!words && head?.parked_since && !head.is_over) words = `Every teacher replica has been away for ${ago(head.now - head.parked_since)}; what is to be scored waits.`;
  $("notice").hidden = !words;
  $("notice").textContent = words;
}

// What runs on without news: clocks, while the node is there

function drawTimes() {
  const head = state.head;
  if (!head) return;
  const now = head.is_over || !connection.isOpen ? head.now : Date.now() / 1000 + connection.skew;
  $("elapsed").textContent = head.started_at === null ? "–" : duration(now - head.started_at);
  $("left").hidden = head.remaining_s === null || !connection.isOpen;
  $("remaining").textContent = duration((head.remaining_s ?? 0) - (now - head.now));
}

// The sections

function drawHead(head) {
  $("run").textContent = head.run || "run";
  $("phase").textContent = head.phase;
  $("phase").dataset.kind = { failed: "bad", "waiting for the teacher": "warn", draining: "warn", stopped: "warn", starting: "quiet" }[head.phase] ?? "good";
  $("step").textContent = count(head.step);
  $("steps").textContent = head.steps === null ? "" : ` of ${count(head.steps)}`;
  const share = head.steps ? Math.min(1, head.step / head.steps) : 0;
  $("progress").firstElementChild.style.width = percent(share);
  $("progress").setAttribute("aria-valuenow", head.step);
  $("progress").setAttribute("aria-valuemax", head.steps ?? 0);
  $("out").textContent = head.out ? `${head.out}${head.checkpoint_step === null ? "" : `, checkpoint of step ${head.checkpoint_step}`}` : "";
  for (const id of ["loss-name", "divergence-name"]) $(id).textContent = head.objective.endsWith("kl") ? "KL" : "loss";
  document.title = `${head.steps ? `${head.step}/${head.steps} ` : ""}${head.run || "run"}: ${head.phase}`;
}

function drawWeights(weights) {
  $("v-learner").textContent = `v${weights.learner}`;
  $("v-syncer").textContent = weights.coming === null ? `v${weights.live}` : `v${weights.live} → v${weights.coming}`;
  $("v-syncer-note").textContent = weights.coming === null ? "live everywhere" : `v${weights.coming} is on its way`;
  $("v-sampler").textContent = `v${weights.sampler}`;
  const chips = weights.in_flight.slice(-12).map(([version, rollouts]) => element("span", "chip", `v${version} `, element("small", "", `×${count(rollouts)}`)));
  $("v-flight").replaceChildren(...(chips.length ? chips : ["–"]));
  $("v-flight-note").textContent = `sampled answers, by the version that began them; ${count(weights.num_sampling)} more are being sampled`;
}

function drawPipeline(pipeline) {
  const list = $("pipeline");
  const names = JSON.stringify(pipeline.stages.map((stage) => [stage.name, stage.channel?.name]));
  if (list.dataset.names !== names) {
    list.dataset.names = names;
    list.replaceChildren(...pipeline.stages.map(makeStage));
  }
  pipeline.stages.forEach((stage, i) => updateStage(list.children[i], stage, pipeline.stages[i + 1]));
  const slots = pipeline.slots;
  $("slots").textContent = slots ? `${slots[0]} of ${plural(slots[2], "slot")} decoding${slots[1] ? `, ${slots[1]} waiting` : ""}` : "";
  $("rollouts").textContent = `rollouts: ${Object.entries(pipeline.rollouts).filter(([name, n]) => n || name !== "failed").map(([name, n]) => `${count(n)} ${name}`).join(" · ")}`;
}

function makeStage(stage) {
  const bar = element("div", "bar", element("i", "worked"), element("i", "room"), element("i", "input"));
  const card = element("div", "actor", element("div", "name", stage.name), bar, element("div", "what"));
  card.dataset.actor = stage.name;
  const item = element("li", stage.channel ? "" : "last", card);
  if (stage.channel) {
    const channel = element("div", "channel", element("div", "name", stage.channel.name), element("div", "tube", element("i")), element("div", "fill"));
    channel.dataset.channel = stage.channel.name;
    item.append(channel);
  }
  return item;
}

function updateStage(item, stage, next) {
  const [card, channel] = item.children;
  card.dataset.state = stage.state;
  const [name, bar, what] = card.children;
  const shares = stage.shares;
  const parts = shares ? [shares.worked, shares.waited_room, shares.waited_input] : [0, 0, 0];
  parts.forEach((share, i) => { bar.children[i].style.width = `${100 * share}%`; });
  const words = [];
  if (shares) words.push(element("b", "", percent(shares.worked)), " busy");
  else words.push(stage.state);
  if (stage.waits_for) words.push(`, waits for ${stage.waits_for}`);
  if (stage.restarts) words.push(`, ${plural(stage.restarts, "restart")}`);
  what.replaceChildren(...words);
  if (!channel) return;
  const { items, max_items: room, to } = stage.channel;
  channel.querySelector(".tube i").style.width = room ? `${Math.min(100, (100 * items) / room)}%` : "0";
  channel.toggleAttribute("data-full", Boolean(room) && items >= room);
  channel.querySelector(".fill").textContent = `${items === null ? "–" : `${count(items)} / ${count(room)}`}${next && next.name === to ? "" : ` to ${to}`}`;
}

function drawRates(rates) {
  figures("speed-figures", [
    [count(rates.trained_per_s), "trained", "a"],
    [count(rates.sampled_per_s), "sampled", "b"],
    [count(rates.trained_total), "trained in all"],
  ]);
  drawKlNote();
}

function drawKlNote() {
  const held = state.curves?.held_out ?? [];
  const last = held.at(-1);
  const words = [];
  if (state.rates?.is_measuring) words.push("held-out prompts are being measured");
  if (!held.length && !words.length) words.push(state.head?.step ? "no held-out measurement in this run so far" : "held-out prompts: not measured yet");
  if (last) words.push(`held-out: version ${last.version}, ${plural(last.num_prompts, "prompt")}`);
  if (last && last.reference_nll !== null) words.push(`-log p of the references ${fromTo(held[0].reference_nll, last.reference_nll)} nats/token`);
  if (last && last.score !== null) words.push(`score ${fromTo(held[0].score, last.score)}`);
  $("kl-note").textContent = words.join(" · ");
}

function drawCurves(curves) {
  const held = curves.held_out;
  const loss = curves.loss.at(-1);
  const shown = loss ? [[number(loss[1]), "in training", "a"]] : [];
  if (held.length) shown.push([fromTo(held[0].kl, held.at(-1).kl), "held-out", "b"]);
  figures("kl-figures", shown);
  chart($("kl-chart"), [
    { name: "in training", points: curves.loss, className: "a" },
    { name: "held-out", points: held.map((each) => [each.version, each.kl]), className: "b", dots: true },
  ], number);
  chart($("speed-chart"), [
    { name: "trained", points: curves.trained, className: "a" },
    { name: "sampled", points: curves.sampled, className: "b" },
  ], count);
  drawKlNote();
}

function drawStaleness(staleness) {
  const shown = [];
  if (staleness.mean !== null) shown.push([number(staleness.mean), "mean"], [count(staleness.ages.at(-1)[0]), "max"]);
  if (staleness.limit !== null) shown.push([count(staleness.limit), "allowed"]);
  figures("stale-figures", shown);
  columns($("stale-chart"), staleness.ages, staleness.limit);
}

function drawTeacher(teacher) {
  const shown = [];
  if (teacher.num_replicas) shown.push([`${count(teacher.num_up)} of ${count(teacher.num_replicas)}`, teacher.num_replicas === 1 ? "replica up" : "replicas up"]);
  shown.push([count(teacher.num_scored), "rollouts scored"]);
  if (teacher.retries) shown.push([count(teacher.retries), teacher.retries === 1 ? "retry" : "retries"]);
  figures("teacher-figures", shown);
  const items = teacher.replicas.map((replica) => {
    const since = replica.since === null ? "" : ` since ${timeOfDay(replica.since)}`;
    const reason = replica.reason && replica.state !== "closed" ? element("div", "quiet", replica.reason) : "";
    const item = element("li", "", element("span", "name", replica.name), element("span", "state", `${replica.words}${since}`), reason);
    item.dataset.state = replica.state;
    return item;
  });
  if (!items.length) items.push(element("li", "quiet", teacher.num_scored ? "works inside this process" : "not asked yet"));
  if (teacher.num_replicas > teacher.replicas.length) items.push(element("li", "quiet", `and ${count(teacher.num_replicas - teacher.replicas.length)} more`));
  $("replicas").replaceChildren(...items);
}

function drawAnswers(answers) {
  $("answers-none").hidden = answers.trained.length > 0;
  $("answers-none").textContent = state.head?.step ? "this trainer does not say what single tokens cost" : "after the first step";
  $("heat-legend").hidden = !answers.trained.length;
  const before = new Map([...$("answers").children].map((each) => [each.dataset.key, each]));
  $("answers").replaceChildren(...answers.trained.map((answer) => {
    const key = `${state.head?.started_at}/${answer.step}/${answer.rollout_id}`;
    const article = before.get(key) ?? makeAnswer(answer, key); // who is reading one keeps it
    article.querySelector(".prompt").textContent = answer.prompt;
    return article;
  }));
  $("held-out").hidden = !answers.held_out.length;
  $("held-answers").replaceChildren(...answers.held_out.map((answer) => element("article", "",
    element("div", "prompt", answer.prompt),
    element("div", "answer", answer.answer),
    element("div", "meta", `version ${answer.version} · KL ${number(answer.kl)} nats/token`),
  )));
}

const heat = (nats) => 1 - Math.exp(-Math.max(0, nats) / 1.5); // 0.5, 1, 2 nats are told apart, and 8 is no different from 9

function makeAnswer(answer, key) {
  const versions = answer.versions.map(([version]) => version);
  const first = versions[0];
  const last = versions.at(-1);
  const finite = answer.divergences.filter(Number.isFinite);
  const meta = [
    `step ${answer.step}`,
    `rollout ${answer.rollout_id}`,
    first === last ? `version ${first}` : `versions ${first}–${last}`,
    `${plural(answer.age, "version")} old`,
    plural(answer.num_tokens, "token"),
    finite.length ? `mean ${number(finite.reduce((a, b) => a + b, 0) / finite.length)} nats` : "not finite",
    { stop: "ended by itself", length: "cut at the limit", reference: "a reference completion" }[answer.finish_reason] ?? answer.finish_reason,
  ];
  const tokens = element("div", "answer tokens", ...answer.pieces.map((piece, i) => {
    const span = element("span", "");
    if (piece === "") span.append(element("span", "mark", "▫"));
    else if (piece.trim() === "" && piece.includes("\n")) span.append(element("span", "mark", "⏎"), piece);
    else span.append(piece);
    span.dataset.i = i;
    const cost = answer.divergences[i];
    if (Number.isFinite(cost)) span.style.setProperty("--heat", heat(cost).toFixed(3));
    else span.classList.add("unknown");
    return span;
  }));
  tokens.tabIndex = 0;
  tokens.setAttribute("aria-label", `${answer.pieces.join("")} (arrow keys: token by token)`);
  const rest = answer.num_tokens - answer.pieces.length;
  if (rest > 0) tokens.append(element("span", "quiet", ` … and ${plural(rest, "token")} more`));
  const told = element("div", "told quiet", "point at a token, or tap it");
  const tell = (i) => {
    if (!(i >= 0 && i < answer.pieces.length)) return;
    tokens.querySelector(".on")?.classList.remove("on");
    tokens.children[i].classList.add("on");
    tokens.dataset.at = i;
    told.textContent = describeToken(answer, i);
  };
  for (const kind of ["pointerover", "click"]) {
    tokens.addEventListener(kind, (event) => tell(Number(event.target.closest("[data-i]")?.dataset.i)));
  }
  tokens.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); tell(Number(tokens.dataset.at ?? -1) + by); }
  });
  const article = element("article", "", element("div", "meta", meta.join(" · ")), element("div", "prompt"), tokens, told);
  article.dataset.key = key;
  return article;
}

function describeToken(answer, i) {
  const version = answer.versions.find(([, start, end]) => start <= i && i < end)?.[0];
  return [
    JSON.stringify(answer.pieces[i]),
    `${state.answers.is_objective_kl ? "KL" : "loss"} ${number(answer.divergences[i])}`,
    `log p: student ${number(answer.student_logprobs[i])}, teacher ${number(answer.teacher_logprobs[i])}`,
    version === undefined ? "" : `sampled by v${version}`,
    `token ${i + 1} of ${answer.num_tokens}`,
  ].filter(Boolean).join(" · ");
}

const FAULTS = {
  teacher_retries: "teacher retries", teacher_outages: "teacher outages", teacher_parked_s: "s without a teacher",
  actor_restarts: "actor restarts", rollouts_requeued: "rollouts sampled again", rollouts_failed: "rollouts given up",
  steps_skipped: "steps skipped", warnings: "other warnings",
};

function drawMessages(messages) {
  const met = Object.entries(FAULTS).filter(([name]) => messages.faults[name]).map(([name, words]) => `${number(messages.faults[name])} ${words}`);
  $("faults").textContent = met.length ? `faults so far: ${met.join(", ")}` : "no faults so far";
  $("log").replaceChildren(...messages.newest.map((message) => {
    const item = element("li", "", element("time", "", timeOfDay(message.at)), element("span", "", message.text));
    item.dataset.level = message.level;
    return item;
  }));
}

// Charts

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const made = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) made.push(Number((i * step).toPrecision(12)));
  return made;
}

function frame(figure) {
  const width = Math.max(240, figure.clientWidth || 600);
  const height = 170;
  return { width, height, left: 42, right: width - 12, top: 10, bottom: height - 22 };
}

function chart(figure, series, format) {
  const all = series.flatMap((each) => each.points).filter(([, y]) => Number.isFinite(y));
  if (!all.length) {
    figure.replaceChildren(element("p", "quiet", "after the first step"));
    return;
  }
  const box = frame(figure);
  const xs = all.map(([x]) => x);
  const [firstX, lastX] = [Math.min(...xs), Math.max(...xs)];
  const highest = Math.max(...all.map(([, y]) => y));
  const lowest = Math.min(0, ...all.map(([, y]) => y));
  const rows = ticks(lowest, highest, 4);
  const top = Math.max(highest, rows.at(-1)) + (highest - lowest) * 0.04 || 1;
  const x = (value) => (lastX === firstX ? (box.left + box.right) / 2 : box.left + ((value - firstX) / (lastX - firstX)) * (box.right - box.left));
  const y = (value) => box.bottom - ((value - lowest) / (top - lowest)) * (box.bottom - box.top);
  const svg = graphic("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img" });
  svg.append(graphic("title", {}, series.map((each) => `${each.name}: ${each.points.length ? format(each.points.at(-1)[1]) : "none"}`).join(", ")));
  for (const row of rows) {
    svg.append(graphic("line", { class: "grid", x1: box.left, x2: box.right, y1: y(row), y2: y(row) }));
    svg.append(graphic("text", { x: box.left - 6, y: y(row) + 4, "text-anchor": "end" }, COMPACT.format(row)));
  }
  for (const column of ticks(firstX, lastX, 6).filter(Number.isInteger)) {
    svg.append(graphic("text", { x: x(column), y: box.height - 5, "text-anchor": "middle" }, column < 1e5 ? COUNT.format(column) : COMPACT.format(column)));
  }
  for (const each of series) {
    let path = "";
    let isDrawing = false;
    const finite = each.points.filter(([, value]) => Number.isFinite(value));
    for (const [at, value] of each.points) {
      if (Number.isFinite(value)) path += `${isDrawing ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      isDrawing = Number.isFinite(value);
    }
    svg.append(graphic("path", { class: `line ${each.className}`, d: path }));
    for (const [at, value] of each.dots || finite.length === 1 ? finite : []) {
      svg.append(graphic("circle", { class: `dot ${each.className}`, cx: x(at), cy: y(value), r: 3.5 }));
    }
  }
  readOut(svg, box, series, { x, firstX, lastX }, format);
  figure.replaceChildren(svg);
}

function readOut(svg, box, series, scale, format) {
  const line = graphic("line", { class: "at", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const words = graphic("text", { class: "readout", y: box.top + 4 });
  svg.append(line, words);
  const show = (event) => {
    const place = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * box.width;
    const wanted = scale.firstX + ((place - box.left) / (box.right - box.left)) * (scale.lastX - scale.firstX);
    const near = series.map((each) => each.points.reduce((best, point) => (best && Math.abs(best[0] - wanted) <= Math.abs(point[0] - wanted) ? best : point), null));
    const at = near.filter(Boolean).map(([x]) => x).sort((a, b) => Math.abs(a - wanted) - Math.abs(b - wanted))[0];
    const told = series.flatMap((each, i) => (near[i] && near[i][0] === at ? [`${each.name} ${format(near[i][1])}`] : []));
    line.setAttribute("x1", scale.x(at));
    line.setAttribute("x2", scale.x(at));
    line.setAttribute("visibility", "visible");
    const isRight = scale.x(at) > (box.left + box.right) / 2;
    words.setAttribute("x", scale.x(at) + (isRight ? -6 : 6));
    words.setAttribute("text-anchor", isRight ? "end" : "start");
    words.textContent = `${COUNT.format(at)}: ${told.join(", ")}`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    words.textContent = "";
  });
}

function columns(figure, ages, limit) {
  if (!ages.length) {
    figure.replaceChildren(element("p", "quiet", "after the first step"));
    return;
  }
  const box = frame(figure);
  const total = ages.reduce((sum, [, n]) => sum + n, 0);
  const oldest = ages.at(-1)[0];
  const last = limit !== null && limit <= Math.max(24, 2 * oldest) ? Math.max(oldest, limit) : oldest;
  const slot = (box.right - box.left) / (last + 1);
  const highest = Math.max(...ages.map(([, n]) => n)) / total;
  const y = (share) => box.bottom - (share / highest) * (box.bottom - box.top - 14);
  const svg = graphic("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img" });
  svg.append(graphic("title", {}, ages.map(([age, n]) => `${age}: ${n}`).join(", ")));
  svg.append(graphic("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const width = Math.max(1, Math.min(90, slot * 0.7));
  for (const [age, n] of ages) {
    const middle = box.left + slot * (age + 0.5);
    svg.append(graphic("rect", { class: "column", x: middle - width / 2, y: y(n / total), width, height: Math.max(1, box.bottom - y(n / total)), rx: Math.min(3, width / 4) }));
    if (slot > 34) svg.append(graphic("text", { x: middle, y: y(n / total) - 4, "text-anchor": "middle" }, n / total < 0.01 ? "<1%" : percent(n / total)));
  }
  for (const age of ticks(0, last, Math.min(last || 1, 12)).filter(Number.isInteger)) {
    svg.append(graphic("text", { x: box.left + slot * (age + 0.5), y: box.height - 5, "text-anchor": "middle" }, COUNT.format(age)));
  }
  if (limit !== null && last >= limit) {
    const at = Math.min(box.right, box.left + slot * (limit + 1) - 1);
    svg.append(graphic("line", { class: "limit", x1: at, x2: at, y1: box.top, y2: box.bottom }));
  }
  figure.replaceChildren(svg);
}

// Start

for (const nats of [0, 0.5, 1, 2, 4]) {
  const mark = element("i", "", nats === 4 ? "4+" : String(nats));
  mark.style.left = percent(heat(nats));
  document.querySelector(".scale").append(mark);
}
let drawnWidth = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width === drawnWidth) return;
  drawnWidth = entry.contentRect.width;
  requestAnimationFrame(() => REDRAW.filter((name) => state[name]).forEach(draw));
}).observe(document.querySelector("main"));
setInterval(drawConnection, 1000);
connect();
