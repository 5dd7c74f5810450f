//! What an operator sees in a browser: Chromium at an agent's status page.
//!
//! Promise: names that come from elsewhere are only ever text; through a real failover the page says what the agents say,
//! without being loaded again; it can be read in light, in dark and on a phone; and its own policy finds nothing to forbid.
//! `UNDERSTUDY_PICTURES=DIR` keeps pictures of it for people.

mod chromium;

use anyhow::{Result, ensure};
use replicator::control::api::{ProtectionState, Role};
use replicator::demo::lab::{Host, VM};
use replicator::metrics::{Metrics, MetricsServer};

use self::chromium::Chromium;
use crate::stage::{play_long, runtime};

/// A name that is a program where it is taken for markup.
const HOSTILE: &str = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&amp;";

/// Widths of windows: a desk's and a small phone's.
const DESK: (u32, u32) = (1280, 900);
const PHONE: (u32, u32) = (360, 740);

/// The page's text.
const TEXT: &str = "document.body.innerText";

/// The colours of page and text as they are shown, and how far the page is wider than its window.
const LOOKS: &str = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, \
                     document.documentElement.scrollWidth - document.documentElement.clientWidth]";

#[test]
fn names_are_only_text() {
    if let Some(missing) = chromium::missing() {
        println!("skipped: names on the status page: {missing}");
        return;
    }
    let outcome: Result<()> = runtime().block_on(async {
        let metrics = Metrics::new();
        let vm = metrics.vm(HOSTILE);
        vm.set_role(Role::Primary);
        vm.set_peer(HOSTILE);
        vm.set_state(&ProtectionState::Degraded);
        let _ = (metrics.peer(HOSTILE), metrics.witness(HOSTILE));
        let server = MetricsServer::bind("127.0.0.1:0".parse()?, metrics, HOSTILE).await?;
        let url = format!("http://{}/", server.address()?);
        let serving = tokio::spawn(server.serve());
        let mut chromium = Chromium::start(None, "names").await?;
        chromium.go(&url).await?;
        chromium.until("that it is live", "document.getElementById('live').textContent === 'live'", TEXT).await?;
        let places = "['#agent', '.vm .name', '#peers td'].map((place) => document.querySelector(place).textContent)";
        let shown = chromium.value(places).await?;
        ensure!(shown == serde_json::json!([HOSTILE, HOSTILE, HOSTILE]), "the names are shown as {shown}");
        let made = "document.querySelectorAll('img:not(header > img), script:not([src])').length";
        ensure!(chromium.value(made).await? == 0, "a name became markup");
        let title = chromium.value("document.title").await?;
        ensure!(title == format!("{HOSTILE} \u{2013} Understudy"), "the title is {title}");
        let complaints = chromium.complaints();
        ensure!(complaints.is_empty(), "the page complains: {complaints:?}");
        serving.abort();
        chromium.close().await
    });
    if let Err(error) = outcome {
        panic!("names on the status page: {error:#}");
    }
}

#[test]
fn the_page_shows_a_failover() {
    if let Some(missing) = chromium::missing() {
        println!("skipped: a failover on the status page: {missing}");
        return;
    }
    play_long("a failover on the status page", async |stage| {
        stage.set_protected().await?;
        let mut client = stage.writer("p").await?;
        let namespace = stage.lab.namespace("c");
        let mut on = Vec::new();
        for host in [Host::A, Host::B] {
            let mut chromium = Chromium::start(Some(&namespace), host.name()).await?;
            chromium.look_as("light", DESK.0, DESK.1).await?;
            chromium.go(&format!("http://{}/", host.metrics())).await?;
            on.push(chromium);
        }
        let [mut a, mut b] = <[Chromium; 2]>::try_from(on).expect("there are two hosts");
        a.until("the primary", &card("primary", "protected"), TEXT).await?;
        b.until("the standby", &card("standby", "protected"), TEXT).await?;
        // A few steps of history, each drawn.
        let drawn = "['pause', 'lag'].every((kind) => \
                     document.querySelector(`.${kind} .curve`).getAttribute('d').split('L').length > 4)";
        a.until("the curves", drawn, "document.querySelector('.pause .curve').getAttribute('d')").await?;
        let hidden = b.value("document.querySelector('.plots').hidden").await?;
        ensure!(hidden == true, "a standby pauses nothing, but has curves of it");
        for (text, page) in [("host-b", &mut a), ("host-a", &mut b)] {
            page.until("its peer", &format!("{}.includes('{text}')", fact("Peer")), TEXT).await?;
        }
        a.until("the witness", "document.querySelector('#sums').innerText.includes('answers')", TEXT).await?;
        for (page, name) in [(&mut a, "host-a"), (&mut b, "host-b")] {
            it_can_be_read(page, &format!("{name}-protected")).await?;
            let complaints = page.complaints();
            ensure!(complaints.is_empty(), "{name}'s page complains: {complaints:?}");
        }

        stage.lab.kill_host_a().await?;
        client.goes_on().await?;
        b.until("the survivor", &format!("{}.includes('survivor')", fact("Role")), TEXT).await?;
        let epochs = "[...document.querySelectorAll('.vm dl > div')].filter((one) => !one.hidden)\
                      .map((one) => one.firstChild.textContent).filter((title) => title.startsWith('Epoch '))";
        let epochs = b.value(epochs).await?;
        ensure!(epochs == serde_json::json!(["Epoch committed"]), "what the standby had is left: {epochs}");
        b.until("the failover", &format!("{}.includes('silence')", fact("Last failover to here")), TEXT).await?;
        b.until("the event", "document.querySelector('#events .e-failover') !== null", TEXT).await?;
        let risk = "document.querySelector('#sums .bad').innerText.includes('at risk')";
        b.until("that the VM is at risk", risk, TEXT).await?;
        let generation = stage.status(Host::B).await?.generation;
        b.until("the generation", &format!("{} === '{generation}'", fact("Generation")), TEXT).await?;
        let silent = "document.body.classList.contains('stale') && \
                      document.getElementById('live').textContent.includes('does not answer')";
        a.until("that its agent is gone", silent, TEXT).await?;
        ensure!(a.value("document.querySelector('.vm .name').textContent").await? == VM, "what it last knew is gone");
        it_can_be_read(&mut b, "host-b-survivor").await?;
        a.picture("host-a-gone").await?;
        let complaints = b.complaints();
        ensure!(complaints.is_empty(), "host-b's page complains: {complaints:?}");
        a.close().await?;
        b.close().await?;
        stage.nothing_lost(client).await.map(drop)
    });
}

/// Whether the card of the VM is that of such a copy.
fn card(role: &str, state: &str) -> String {
    format!(
        "document.querySelector('.vm .name').textContent === '{VM}' && {} === '{role}' && \
         document.querySelector('.vm .state').textContent === '{state}'",
        fact("Role")
    )
}

/// What the card says under a title, as an expression.
fn fact(title: &str) -> String {
    format!(
        "[...document.querySelectorAll('.vm dl > div')].find((one) => one.firstChild.textContent === '{title}')\
         .lastChild.textContent"
    )
}

/// In light and dark, at a desk and on a phone: dark is dark, text stands out, and nothing needs to be scrolled sideways.
async fn it_can_be_read(page: &mut Chromium, name: &str) -> Result<()> {
    for scheme in ["light", "dark"] {
        for (place, (width, height)) in [("desk", DESK), ("phone", PHONE)] {
            page.look_as(scheme, width, height).await?;
            let looks = page.value(LOOKS).await?;
            let bright = |at: usize| brightness(looks[at].as_str().unwrap_or_default());
            let (ground, text) = (bright(0)?, bright(1)?);
            ensure!((ground > text) == (scheme == "light"), "{name}, {scheme}: {looks}");
            ensure!(ground.abs_diff(text) > 400, "{name}, {scheme}: text does not stand out: {looks}");
            ensure!(looks[2] == 0, "{name} on a {place} is wider than its window: {looks}");
            page.picture(&format!("{name}-{scheme}-{place}")).await?;
        }
    }
    page.look_as("light", DESK.0, DESK.1).await
}

/// The sum of the three parts of `rgb(r, g, b)`.
fn brightness(color: &str) -> Result<u32> {
    let parts = color.trim_start_matches("rgb(").trim_end_matches(')').split(',');
    Ok(parts.map(|part| part.trim().parse::<u32>()).sum::<Result<_, _>>()?)
}
