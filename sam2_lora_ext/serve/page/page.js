// The page: strips, prompts, one panel per model, kept masks. All its data comes from /api/.

import { View, colourOf } from "/view.js";

const $ = id => document.getElementById(id);
const tool = () => document.querySelector("[name=tool]:checked").value;
const page = { image: null, clicks: [], box: null, kept: [], scale: null, asked: 0 };
let state, views = [];

async function ask(path, body, method = "POST") {
  const raw = body instanceof Blob;
  const answer = await fetch(path, {
    method, body: body === undefined ? undefined : raw ? body : JSON.stringify(body),
    headers: body === undefined || raw ? {} : { "Content-Type": "application/json" },
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail);
  return found;
}

// Runs an action and shows its error on the page.
async function attempt(action) {
  document.body.classList.add("busy");
  try {
    say("");
    await action();
  } catch (error) {
    say(error instanceof TypeError ? `the server does not answer (${error.message})` : error.message, true);
  } finally {
    document.body.classList.remove("busy");
  }
}

function say(text, wrong = false) {
  $("message").textContent = text;
  $("message").classList.toggle("wrong", wrong);
}

function option(value, text = value) {
  const made = document.createElement("option");
  [made.value, made.textContent] = [value, text];
  return made;
}

const colours = id => colourOf(state.classes.findIndex(one => one.id === id));
const nameOf = id => state.classes.find(one => one.id === id)?.name ?? `class ${id}`;
const modelOf = view => state.models.find(one => one.name === view.model.value);
const usesClasses = view => $("class-prompts").checked && modelOf(view).class_prompts;
const prompts = () => ({ clicks: page.clicks, box: page.box });
const asked = () => ({ image: page.image, ...prompts(), whole: $("whole").checked });

// The panels are inert until the new strip is shown, so that no click on the old one is sent for the new one.
async function openStrip(image) {
  if (!(image >= 0 && image < state.images.length)) return;
  $("panels").inert = $("marks").inert = true;
  Object.assign(page, { image, clicks: [], box: null, asked: page.asked + 1 });
  const name = state.images[image];
  $("strip").value = name;
  $("place").textContent = `${image + 1} of ${state.images.length}`;
  const found = await ask(`/api/images/${image}/open`, views.map(view => view.model.value));
  const { width, height } = found;
  if (page.image !== image) return;
  $("panels").classList.toggle("square", width < 2.5 * height);
  await Promise.all(views.map(view => view.show(`/api/images/${image}`, width, height, name)));
  page.scale = null;
  resize();
  showKept(found);
  $("panels").inert = $("marks").inert = false;
  await refresh();
}

// Fits the panel's width, but keeps strips at least 160 CSS pixels high: phones scroll them sideways.
function resize(factor = null) {
  if (!views.length || page.image === null) return;
  const { scroll, canvas } = views[0];
  const fit = Math.max((scroll.clientWidth || 1) / canvas.width, Math.min(160 / canvas.height, 2));
  page.scale = factor === null ? null : Math.min(Math.max((page.scale ?? fit) * factor, 0.05), 16);
  for (const view of views) view.size(page.scale ?? fit);
}

// Requests the masks of the current prompts and shows them, unless a later request was made meanwhile.
async function refresh() {
  const turn = ++page.asked, answers = new Map();
  const clicked = page.clicks.length > 0 || page.box !== null;
  const byClick = views.filter(view => !usesClasses(view)), byClass = views.filter(usesClasses);
  if (clicked && byClick.length) {
    const models = [...new Set(byClick.map(view => view.model.value))];
    const found = await ask("/api/predict", { ...asked(), models });
    for (const answer of found.answers) answers.set(answer.model, answer);
  }
  const findings = new Map();
  for (const model of new Set(byClass.map(view => view.model.value)))
    findings.set(model, (await ask("/api/classes", { image: page.image, model })).found);
  if (turn !== page.asked) return;
  const kept = page.kept.map(one => ({ runs: one.runs, colour: colours(one.class_id) }));
  for (const view of byClick) {
    const answer = answers.get(view.model.value);
    view.set([...kept, ...(answer ? [{ runs: answer.runs, strong: true }] : [])], prompts());
    view.facts.textContent = answer ? facts(answer) : "";
    view.keep.disabled = !answer?.area;
  }
  for (const view of byClass) {
    const found = findings.get(view.model.value).filter(one => one.parts.length);
    const parts = found.flatMap(one => one.parts.map(runs => ({ runs, colour: colours(one.class_id), strong: true })));
    view.set([...kept, ...parts], { clicks: [], box: null });
    const words = found.map(one => `${nameOf(one.class_id)} ${one.score.toFixed(2)}`);
    view.facts.textContent = words.join(", ") || "no defect found";
    view.keep.disabled = !found.length;
  }
}

function facts({ area, score, window: [start, stop], encode_ms, decode_ms }) {
  const seen = state.windows ? `, columns ${start}–${stop}` : "";
  const time = `${Math.round(decode_ms)} ms${encode_ms ? ` after ${Math.round(encode_ms)} ms of encoding` : ""}`;
  return `${area.toLocaleString("en")} px, predicted IoU ${score.toFixed(2)}${seen}, ${time}`;
}

function showKept({ kept, clean, ...counts }) {
  page.kept = kept;
  $("clean").checked = clean;
  $("clean").disabled = kept.length > 0;
  $("list").replaceChildren(...kept.map(one => {
    const [item, swatch, remove] = ["li", "span", "button"].map(kind => document.createElement(kind));
    swatch.className = "swatch";
    swatch.style.background = `rgb(${colours(one.class_id)})`;
    [remove.textContent, remove.title] = ["✕", "remove this mask"];
    remove.setAttribute("aria-label", `remove mask ${one.number}`);
    remove.onclick = () => attempt(async () => {
      showKept(await ask(`/api/images/${page.image}/masks/${one.number}`, undefined, "DELETE"));
      await refresh();
    });
    item.append(swatch, `${nameOf(one.class_id)}, ${one.area.toLocaleString("en")} px, ${one.model}`, remove);
    return item;
  }));
  showCounts(counts);
}

function showCounts({ labelled, masks, unsaved }) {
  const words = `${masks} mask${masks === 1 ? "" : "s"} on ${labelled} strip${labelled === 1 ? "" : "s"}`;
  $("counts").textContent = words + (unsaved ? ", not saved yet" : "");
}

const keep = view => attempt(async () => {
  const way = usesClasses(view) ? { image: page.image } : { ...asked(), class_id: Number($("class").value) };
  const found = await ask("/api/keep", { ...way, model: view.model.value });
  [page.clicks, page.box] = [[], null];
  showKept(found);
  await refresh();
});

function change(action) {
  if (page.image === null) return;
  action();
  attempt(refresh);
}

const actions = {
  undo: () => change(() => { if (page.clicks.length) page.clicks = page.clicks.slice(0, -1); else page.box = null; }),
  clear: () => change(() => { [page.clicks, page.box] = [[], null]; }),
  previous: () => attempt(() => openStrip(page.image - 1)),
  next: () => attempt(() => openStrip(page.image === null ? 0 : page.image + 1)),
  smaller: () => resize(1 / 1.5),
  fit: () => resize(),
  larger: () => resize(1.5),
  save: () => attempt(async () => {
    const { folder, note, ...counts } = await ask("/api/save", { format: $("format").value, name: $("name").value });
    showCounts(counts);
    say(`saved in ${folder}${note ? `; ${note}` : ""}`);
  }),
};
const KEYS = { u: "undo", Escape: "clear", p: "previous", n: "next" };

function panel(model) {
  const figure = $("panel").content.firstElementChild.cloneNode(true);
  const clicked = (x, y, label) => change(() => { page.clicks = [...page.clicks, [x, y, label]]; });
  const boxed = box => change(() => { [page.box, page.clicks] = [box, []]; });
  const view = new View(figure, tool, clicked, boxed);
  view.model.append(...state.models.map(one => option(one.name)));
  view.model.value = model;
  view.model.onchange = () => { if (page.image !== null) attempt(refresh); };
  view.keep.onclick = () => keep(view);
  view.keep.disabled = true;
  view.scroll.onscroll = () => views.forEach(other => {
    if (other !== view) other.scroll.scrollTo(view.scroll.scrollLeft, view.scroll.scrollTop);
  });
  $("panels").append(figure);
  return view;
}

function listStrips(names) {
  state.images = names;
  $("names").replaceChildren(...names.map(name => option(name)));
}

async function begin() {
  state = await ask("/api/state", undefined, "GET");
  listStrips(state.images);
  views = state.models.slice(0, 2).map(one => panel(one.name));
  $("class").append(...state.classes.map(one => option(one.id, one.name)));
  $("format").append(...state.formats.map(name => option(name)));
  $("format").value = "coco";
  $("whole-row").hidden = !state.windows;
  $("classes-row").hidden = !state.models.some(one => one.class_prompts);
  for (const [id, action] of Object.entries(actions)) $(id).onclick = action;
  $("whole").onchange = $("class-prompts").onchange = () => change(() => {});
  document.querySelectorAll("[name=tool]").forEach(one => {
    one.onchange = () => $("panels").classList.toggle("boxing", tool() === "box");
  });
  $("strip").onchange = () => attempt(async () => {
    const image = state.images.indexOf($("strip").value);
    if (image < 0) throw new Error(`there is no strip ${$("strip").value}`);
    await openStrip(image);
  });
  $("clean").onchange = () => attempt(async () => {
    showKept(await ask(`/api/images/${page.image}/clean`, { clean: $("clean").checked }));
  });
  $("file").onchange = () => attempt(() => drop([...$("file").files]));
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", event => {
    event.preventDefault();
    attempt(() => drop([...event.dataTransfer.files]));
  });
  addEventListener("keydown", event => {
    const writing = event.target.matches("input:not([type=radio]):not([type=checkbox]), select");
    if (KEYS[event.key] && !writing && !event.ctrlKey && !event.metaKey) actions[KEYS[event.key]]();
  });
  addEventListener("resize", () => { if (page.scale === null) resize(); });
  showCounts(state);
  if (state.images.length) await openStrip(0);
  else say("Add images, or drop them here.");
}

async function drop(files) {
  for (const file of files) {
    if (file.size > state.largest_upload) throw new Error(`${file.name} is too large: use --images`);
    const { image, images } = await ask(`/api/images?name=${encodeURIComponent(file.name)}`, file);
    listStrips(images);
    if (file === files.at(-1)) await openStrip(image);
  }
}

attempt(begin);
