// Makes the pages faster to use. Without it they still filter, sort and save.
"use strict";

// -- parts that take a while ---------------------------------------------------------------------

async function fetchPart(address, signal) {
  const response = await fetch(address, { signal });
  const text = await response.text();
  if (!response.ok) throw new Error(new DOMParser().parseFromString(text, "text/html").querySelector("[role=alert]")?.textContent ?? text);
  return new DOMParser().parseFromString(text, "text/html").body;
}

// Replaces the element's content by the part at its data-src; until it comes, the seconds are counted.
async function loadPart(element, signal) {
  const began = performance.now();
  // A link is for readers without scripts.
  const doing = element.textContent.trim() + (element.children.length ? " …" : "");
  element.textContent = doing;
  const clock = setInterval(() => {
    element.textContent = `${doing} ${Math.round((performance.now() - began) / 1000)} s`;
  }, 1000);
  try {
    const part = await fetchPart(element.dataset.src, signal);
    clearInterval(clock);
    element.replaceChildren(...part.childNodes);
  } catch (error) {
    clearInterval(clock);
    if (error.name === "AbortError") return;
    const message = document.createElement("p");
    Object.assign(message, { className: "error", role: "alert", textContent: error.message });
    element.replaceChildren(message);
  }
}

async function loadHistograms(form, address, signal) {
  const part = await fetchPart(address, signal).catch(() => null);
  if (part === null) return;
  for (const svg of part.querySelectorAll("svg")) {
    const figure = [...form.querySelectorAll(".figure")].find((each) => each.dataset.key === svg.dataset.key);
    if (!figure) continue;
    figure.replaceChildren(svg);
    dragRange(form, svg);
  }
}

// -- dragging a range on a histogram ---------------------------------------------------------------

function dragRange(form, svg) {
  const start = Number(svg.dataset.start), end = Number(svg.dataset.end);
  const brush = svg.querySelector(".brush"), width = svg.viewBox.baseVal.width;
  const input = (side) => form.elements.namedItem(`${svg.dataset.key}.${side}`);
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * width;
  };
  const value = (x) => Number((start + (x / width) * (end - start)).toPrecision(4)).toString();
  let from = null;
  svg.addEventListener("pointerdown", (event) => {
    from = place(event);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = place(event);
    brush.setAttribute("x", Math.min(from, to));
    brush.setAttribute("width", Math.abs(to - from));
  });
  svg.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const [low, high] = [from, place(event)].sort((a, b) => a - b);
    from = null;
    // A click removes the range. The outermost bins hold what is beyond them.
    const isRange = high - low > 3;
    input("min").value = isRange && low > 0 ? value(low) : "";
    input("max").value = isRange && high < width ? value(high) : "";
    form.requestSubmit();
  });
  svg.addEventListener("pointercancel", () => { from = null; });
}

// -- ticks, which are kept from page to page ---------------------------------------------------------

function keepTicks(form) {
  const key = "ticked", shown = document.getElementById("n-ticked");
  const ticked = new Set(JSON.parse(sessionStorage.getItem(key) ?? "[]"));
  const say = () => { shown.textContent = ticked.size ? `(${ticked.size.toLocaleString("en")})` : ""; };
  for (const box of form.querySelectorAll("input[name=id]")) {
    box.checked = ticked.has(box.value);
    box.addEventListener("change", () => {
      if (box.checked) ticked.add(box.value);
      else ticked.delete(box.value);
      sessionStorage.setItem(key, JSON.stringify([...ticked]));
      say();
    });
  }
  form.addEventListener("submit", () => {
    const here = new Set([...form.querySelectorAll("input[name=id]")].map((box) => box.value));
    for (const id of ticked) {
      if (here.has(id)) continue;
      const input = document.createElement("input");
      Object.assign(input, { type: "hidden", name: "id", value: id });
      form.append(input);
    }
    if (form.elements.which.value === "ticked") sessionStorage.removeItem(key);
  });
  say();
}

// -- keys, to be copied ------------------------------------------------------------------------------

function copyOnClick(button) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.dataset.text);
    button.firstChild.textContent = "Copied";
  });
}

// -- the page ----------------------------------------------------------------------------------------

function leaveOutEmpty(form) {
  form.addEventListener("formdata", (event) => {
    for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
  });
}

const leaving = new AbortController();
addEventListener("pagehide", () => leaving.abort());
for (const part of document.querySelectorAll(".part")) loadPart(part, leaving.signal);
document.querySelectorAll(".copy").forEach(copyOnClick);
const filter = document.getElementById("filter");
if (filter) {
  leaveOutEmpty(filter);
  const count = document.getElementById("count");
  const rows = document.getElementById("rows"), select = document.getElementById("select");
  const list = rows ? loadPart(rows, leaving.signal) : Promise.resolve();
  list.then(() => keepTicks(select));
  loadPart(count, leaving.signal);
  loadHistograms(filter, count.dataset.src.replace("/pairs/count", "/pairs/histograms"), leaving.signal);
}
