// Who may use the installation and how much: tenants, keys and what administrators have changed. Admin keys only.

import { get, post, remove } from "./api.js";
import { compact, moment, shortened } from "./format.js";
import { link, usePolled, visit } from "./hooks.js";
import { html, useRef, useState } from "./html.js";
import { Erasures } from "./erasures.js";
import { Card, Chip, Code, Confirmed, Empty, Field, Polled, Problem, Scrolled, Status, Time, useAction } from "./parts.js";

const LIMITS = ["requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month", "queued_jobs", "unfinished_jobs", "queued_tokens", "streams"];
const OWN_SCOPES = ["submit", "read", "cancel"];
const SCOPES = [...OWN_SCOPES, "metrics", "admin"];

const inWords = (name) => name.replaceAll("_", " ");

const limitsOf = (form) => Object.fromEntries(LIMITS.filter((name) => form.elements[name].value).map((name) => [name, Number(form.elements[name].value)]));

const Limits = ({ limits }) => {
  const set = LIMITS.filter((name) => limits[name] !== null);
  if (!set.length) return html`<span class="soft">none</span>`;
  return set.map((name) => html`<${Chip} key=${name}>${compact(limits[name])} ${inWords(name)}<//>`);
};

function LimitFields({ limits }) {
  return html`<div class="grid four">${LIMITS.map((name) => html`<${Field} key=${name} label=${inWords(name)}><input type="number" name=${name} min="1" step="1" defaultValue=${limits[name] ?? ""} placeholder="no limit" /><//>`)}</div>`;
}

const TENANT_NAME = { required: true, maxlength: "64", pattern: "[A-Za-z0-9][A-Za-z0-9._@\\-]*" };

// A button that opens a form for a tenant or a key: its name, all of its limits, and how far its jobs pass those of other tenants.
function Change({ path, of, nameRules, onChange }) {
  const [isOpen, open] = useState(false);
  const [act, error, isBusy] = useAction();
  const form = useRef(null);
  const onSubmit = (event) => {
    event.preventDefault();
    const { name, max_priority } = form.current.elements;
    const renamed = name.value === of.name ? {} : { name: name.value };
    act(() => post(path, { ...renamed, limits: limitsOf(form.current), max_priority: Number(max_priority.value) })).then((done) => done && (open(false), onChange(done)));
  };
  if (!isOpen) return html`<button type="button" class="quiet" onClick=${() => open(true)}>Change</button>`;
  return html`
    <form class="inset" ref=${form} onSubmit=${onSubmit}>
      <${Field} label="name"><input name="name" ...${nameRules} defaultValue=${of.name} autocomplete="off" spellcheck="false" /><//>
      <${LimitFields} limits=${of.limits} />
      <${Field} label="max priority" hint="0 to 10: how far its jobs pass those of other tenants"><input type="number" name="max_priority" min="0" max="10" step="1" required defaultValue=${of.max_priority} /><//>
      ${error && html`<${Problem} error=${error} />`}
      <div class="actions"><button class="primary" disabled=${isBusy}>Save</button><button type="button" class="quiet" onClick=${() => open(false)}>Close</button></div>
    </form>
  `;
}

function Tenant({ tenant, isAlone, reload }) {
  const [act, error] = useAction();
  const [isErasing, showErasing] = useState(false);
  const path = `v1/admin/tenants/${encodeURIComponent(tenant.name)}`;
  const turn = (enabled) => act(() => post(path, { enabled })).then(reload);
  return html`
    <li class="letter">
      <header>
        <b>${tenant.name}</b><${Status} of=${tenant.enabled ? "ok" : "unhealthy"}>${tenant.enabled ? "enabled" : "disabled"}<//>
        <span class="soft">weight ${tenant.weight}${tenant.max_priority ? `, priority up to ${tenant.max_priority}` : ""}</span>
        <span class="actions end">
          ${!isAlone && html`<a href=${link("access", { tenant: tenant.name })}>Its keys</a>`}
          <button type="button" class="quiet" aria-expanded=${isErasing ? "true" : "false"} onClick=${() => showErasing(!isErasing)}>Erase a user</button>
          ${tenant.enabled ? html`<${Confirmed} label="Disable" question="Refuse all of its keys?" onConfirm=${() => turn(false)} />` : html`<button type="button" onClick=${() => turn(true)}>Enable</button>`}
        </span>
      </header>
      <div class="limits"><span class="soft">Limits:</span> <${Limits} limits=${tenant.limits} /><${Change} path=${path} of=${tenant} nameRules=${TENANT_NAME} onChange=${({ name }) => (isAlone && name !== tenant.name ? visit("access", { tenant: name }) : reload())} /></div>
      ${isErasing && html`<${Erasures} tenant=${tenant.name} />`}
      ${error && html`<${Problem} error=${error} />`}
    </li>
  `;
}

function NewTenant({ reload }) {
  const [act, error, isBusy] = useAction();
  const form = useRef(null);
  const onSubmit = (event) => {
    event.preventDefault();
    const { name, weight } = form.current.elements;
    act(() => post("v1/admin/tenants", { name: name.value, weight: Number(weight.value) })).then((made) => made && (form.current.reset(), reload()));
  };
  return html`
    <form class="filters" ref=${form} onSubmit=${onSubmit}>
      <${Field} label="New tenant"><input name="name" ...${TENANT_NAME} autocomplete="off" placeholder="letters, digits and . _ @ -" /><//>
      <${Field} label="Weight" hint="its share while others wait"><input name="weight" type="number" min="0.01" step="any" defaultValue="1" required /><//>
      <button disabled=${isBusy}>Add</button>
    </form>
    ${error && html`<${Problem} error=${error} />`}
  `;
}

const Shown = ({ secret }) => html`<div role="status"><p>This is the only time that it is shown. Keep it in a safe place.</p><${Code} text=${secret} label="The new key" /></div>`;

// One of the tenants that are known here, or any other by its name.
function TenantField({ tenants, areAll, chosen }) {
  if (areAll) return html`<select name="tenant" defaultValue=${chosen}>${tenants.map(({ name }) => html`<option key=${name} selected=${name === chosen}>${name}</option>`)}</select>`;
  return html`<input name="tenant" list="known-tenants" required maxlength="64" defaultValue=${chosen ?? ""} autocomplete="off" spellcheck="false" /><datalist id="known-tenants">${tenants.map(({ name }) => html`<option key=${name} value=${name}></option>`)}</datalist>`;
}

function NewKey({ tenants, areAll, chosen, reload }) {
  const [act, error, isBusy] = useAction();
  const [secret, setSecret] = useState("");
  const form = useRef(null);
  const onSubmit = (event) => {
    event.preventDefault();
    const { tenant, name, days } = form.current.elements;
    const scopes = SCOPES.filter((scope) => form.current.elements[scope].checked);
    const body = { tenant: tenant.value, name: name.value, scopes, expires_in_seconds: days.value ? Number(days.value) * 86_400 : null };
    act(() => post("v1/admin/keys", body)).then((made) => made && (setSecret(made.key), form.current.reset(), reload()));
  };
  return html`
    <form ref=${form} onSubmit=${onSubmit}>
      <div class="grid four">
        <${Field} label="Tenant"><${TenantField} key=${chosen} tenants=${tenants} areAll=${areAll} chosen=${chosen} /><//>
        <${Field} label="Name"><input name="name" maxlength="256" autocomplete="off" placeholder="what it is for" /><//>
        <${Field} label="Valid for days"><input name="days" type="number" min="1" max="3650" step="1" placeholder="no end" /><//>
        <fieldset><legend>Scopes</legend>${SCOPES.map((scope) => html`<label key=${scope}><input type="checkbox" name=${scope} defaultChecked=${OWN_SCOPES.includes(scope)} /> ${scope}</label>`)}</fieldset>
      </div>
      <div class="actions"><button disabled=${isBusy}>Create key</button></div>
    </form>
    ${error && html`<${Problem} error=${error} />`}
    ${secret && html`<${Shown} secret=${secret} />`}
  `;
}

function Key({ apiKey, reload }) {
  const [act, error] = useAction();
  const [secret, setSecret] = useState("");
  const path = `v1/admin/keys/${apiKey.id}`;
  const rotate = () => act(() => post(`v1/admin/keys/${apiKey.id}/rotate`, { keep_old_seconds: 3600 })).then((made) => made && (setSecret(made.key), reload()));
  const turn = (enabled) => act(() => post(path, { enabled })).then(reload);
  return html`
    <li class="letter">
      <header>
        <span class="mono">${apiKey.id}</span><b>${apiKey.name || html`<span class="soft">unnamed</span>`}</b><span>${apiKey.tenant}</span>
        <${Status} of=${apiKey.status === "valid" ? "ok" : "expired"}>${apiKey.status}<//>
        <span class="soft">${apiKey.scopes.join(", ")}${apiKey.max_priority < 10 ? `, priority up to ${apiKey.max_priority}` : ""}</span>
        <span class="soft">${apiKey.expires_at ? `until ${moment(apiKey.expires_at)}` : ""}</span>
        <span class="actions end">
          ${apiKey.status === "disabled" ? html`<button type="button" onClick=${() => turn(true)}>Enable</button>` : html`<${Confirmed} label="Disable" question="Refuse it from now on?" onConfirm=${() => turn(false)} />`}
          <${Confirmed} label="Rotate" question="Make a new one, and keep this one for an hour?" onConfirm=${rotate} />
          <${Confirmed} label="Delete" question="Delete it for good?" onConfirm=${() => act(() => remove(path)).then(reload)} />
        </span>
      </header>
      <div class="limits"><span class="soft">Limits:</span> <${Limits} limits=${apiKey.limits} /><${Change} path=${path} of=${apiKey} nameRules=${{ maxlength: "256" }} onChange=${reload} /></div>
      ${error && html`<${Problem} error=${error} />`}
      ${secret && html`<${Shown} secret=${secret} />`}
    </li>
  `;
}

const Audit = ({ entries }) => html`
  <${Scrolled} label="Changes"><table>
    <thead><tr><th>When</th><th>Who</th><th>What</th><th>Tenant</th><th>Changes</th></tr></thead>
    <tbody>${entries.map((entry) => html`<tr key=${entry.id}><td><${Time} at=${entry.changed_at} /></td><td>${entry.actor}</td><td>${inWords(entry.action)}</td><td>${entry.tenant}</td><td class="mono">${Object.keys(entry.changes).length ? shortened(JSON.stringify(entry.changes), 120) : "–"}</td></tr>`)}</tbody>
  </table><//>
`;

const PAGE = 50;

// All tenants by name, or the one that the address names.
async function askForTenants({ tenant, after }, signal) {
  if (!tenant) return get("v1/admin/tenants", { limit: PAGE, after }, signal);
  return { data: [await get(`v1/admin/tenants/${encodeURIComponent(tenant)}`, {}, signal)], has_more: false };
}

function Find({ tenant }) {
  const onSubmit = (event) => {
    event.preventDefault();
    visit("access", { tenant: event.target.elements.tenant.value.trim() });
  };
  return html`<form class="filters choices" role="search" onSubmit=${onSubmit}>
    <${Field} label="Only the tenant"><input key=${tenant} type="search" name="tenant" defaultValue=${tenant ?? ""} maxlength="64" autocomplete="off" spellcheck="false" placeholder="its whole name" onSearch=${({ target }) => target.value === "" && visit("access")} /><//>
    <button>Find</button>
  </form>`;
}

const Pages = ({ first, names, next }) => html`<nav class="pages" aria-label="Pages of tenants">${first && html`<a href=${link("access")}>${first}</a>`}${next && html`<a href=${link("access", { after: names[names.length - 1] })}>Next</a>`}</nav>`;

export function Access({ address }) {
  const [tenant, after] = ["tenant", "after"].map((name) => address.query.get(name));
  const tenants = usePolled((signal) => askForTenants({ tenant, after }, signal), 15, [tenant, after]);
  const keys = usePolled((signal) => get("v1/admin/keys", { limit: 100, tenant }, signal), 15, [tenant]);
  const audit = usePolled((signal) => get("v1/admin/audit", { limit: 20 }, signal), 15, []);
  const reload = () => [tenants, keys, audit].forEach((state) => state.reload());
  const known = tenants.data?.data ?? [];
  const areAll = !after && Boolean(tenants.data) && !tenants.data.has_more;
  return html`
    <h1>Access</h1>
    ${(tenant || !areAll) && html`<${Find} tenant=${tenant} />`}
    <${Card} title="Tenants"><${Polled} state=${tenants}>${({ data, has_more }) => html`${!tenant && html`<${NewTenant} reload=${reload} />`}<ul class="batches">${data.map((one) => html`<${Tenant} key=${one.id} tenant=${one} isAlone=${Boolean(tenant)} reload=${reload} />`)}</ul><${Pages} first=${tenant ? "All tenants" : after && "First"} names=${data.map(({ name }) => name)} next=${has_more} />`}<//><//>
    <${Card} title=${tenant ? `Keys of ${tenant}` : "Keys"}><${Polled} state=${keys}>${({ data, has_more }) => html`<${NewKey} tenants=${known} areAll=${areAll} chosen=${tenant} reload=${reload} />${data.length === 0 ? html`<${Empty} title="No keys yet">${tenant ? "The form above makes one." : "Without keys, the API serves only the machine that it runs on."}<//>` : html`<ul class="batches">${data.map((one) => html`<${Key} key=${one.id} apiKey=${one} reload=${reload} />`)}</ul>`}${has_more && html`<p class="soft">The newest hundred${tenant ? "" : "; those of one tenant are shown by its name"}. All of them: celeriac keys list --all</p>`}`}<//><//>
    <${Card} title="Changes"><${Polled} state=${audit}>${({ data }) => (data.length === 0 ? html`<${Empty} title="Nothing has been changed yet" />` : html`<${Audit} entries=${data} />`)}<//><//>
  `;
}
