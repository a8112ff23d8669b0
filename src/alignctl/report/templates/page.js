
"use strict";
for (const box of document.querySelectorAll("[data-answers]")) {
  const items = [...box.querySelectorAll("article")];
  const list = items[0].parentElement;
  const search = box.querySelector("input");
  const choice = box.querySelector("select");
  const count = box.querySelector("output");
  const texts = new Map();
  const textOf = (item) => {
    if (!texts.has(item)) texts.set(item, item.textContent.toLowerCase());
    return texts.get(item);
  };
  const tests = {
    changed: (item) => "changed" in item.dataset,
    same: (item) => !("changed" in item.dataset),
    "runs-on": (item) => "runsOn" in item.dataset,
    stopped: (item) => !("runsOn" in item.dataset),
  };
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const test = tests[choice.value] || (() => true);
    let visible = 0;
    for (const item of items) {
      item.hidden = !(test(item) && (wanted === "" || textOf(item).includes(wanted)));
      visible += item.hidden ? 0 : 1;
    }
    const order = choice.value === "longest"
      ? [...items].sort((a, b) => Number(b.dataset.length) - Number(a.dataset.length))
      : items;
    list.append(...order);
    count.textContent = visible + " of " + items.length;
  };
  search.addEventListener("input", show);
  choice.addEventListener("change", show);
  box.querySelector(".tools").hidden = false;
  show();
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("main > details")) details.open = true;
});
for (const button of document.querySelectorAll("button[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "copied";
  });
}
