use std::error::Error as _;

use super::*;

fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.toml");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn agent_of(text: &str) -> Result<AgentConfig, ConfigError> {
    let (_dir, path) = written(text);
    agent(Some(&path), AgentOverrides::default())
}

fn whole(error: &ConfigError) -> String {
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = agent_of("").unwrap();
    assert_eq!(config.listen, "0.0.0.0:7844".parse().unwrap());
    assert_eq!(config.heartbeat_listen, ["0.0.0.0:7845".parse().unwrap()]);
    assert_eq!(config.reachable_at(), [config.listen]);
    assert_eq!(config.pair_listen, "0.0.0.0:7843".parse().unwrap());
    assert_eq!(config.metrics, "127.0.0.1:9644".parse().ok());
    assert_eq!(config.control_socket(), Path::new("/run/understudy/agent.sock"));
    assert_eq!(config.heartbeat.interval, ms(20));
    assert_eq!(config.heartbeat.silence, ms(200));
    assert_eq!(config.epoch.policy, EpochPolicy::Auto);
}

#[test]
fn every_key_of_the_shipped_example_is_known() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/agent.toml");
    // The example is all comments: uncommented it must still be right.
    let text = fs::read_to_string(example).unwrap();
    let keys: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix('#')).filter(|l| !l.starts_with(' ')).collect();
    assert!(keys.len() > 15, "{keys:?}");
    let config = agent_of(&keys.join("\n")).unwrap();
    let defaults = agent_of("").unwrap();
    assert_eq!(config.heartbeat, defaults.heartbeat, "the example shows the defaults");
    assert_eq!(config.epoch, defaults.epoch);
    assert_eq!(config.gate, defaults.gate);
    assert_eq!(config.listen, defaults.listen);
    assert_eq!(config.metrics, defaults.metrics);
}

#[test]
fn flags_beat_the_file() {
    let (_dir, path) = written("name = 'a'\nlisten = '10.0.0.1:1'\nmetrics = '127.0.0.1:1'\nrun_dir = '/r'\n");
    let flags = AgentOverrides {
        name: Some("b".into()),
        listen: "10.0.0.2:2".parse().ok(),
        metrics: Some(Listen::Off),
        ..AgentOverrides::default()
    };
    let config = agent(Some(&path), flags).unwrap();
    assert_eq!(config.name.as_deref(), Some("b"));
    assert_eq!(config.listen, "10.0.0.2:2".parse().unwrap());
    assert_eq!(config.heartbeat_listen, ["10.0.0.2:7845".parse().unwrap()]);
    assert_eq!(config.metrics, None);
    assert_eq!(config.run_dir, Path::new("/r"));
}

#[test]
fn values_have_units() {
    let config = agent_of(
        "[heartbeat]\ninterval = '10ms'\n[epoch]\npolicy = '25ms'\nshadow = '1GiB'\n[gate]\nbytes = '128MiB'\n\
         [standby.bridges]\nbr0 = 'br7'\n",
    )
    .unwrap();
    assert_eq!(config.heartbeat.interval, ms(10));
    assert_eq!(config.epoch.policy, EpochPolicy::Fixed(ms(25)));
    assert_eq!(config.epoch.shadow, ShadowPolicy::Size(1 << 30));
    assert_eq!(config.gate.bytes, 128 << 20);
    assert_eq!(config.standby.bridges["br0"], "br7");
}

#[test]
fn a_typo_names_its_line_and_key() {
    let error = agent_of("[heartbeat]\nintervall = '10ms'\n").unwrap_err();
    let text = whole(&error);
    assert!(text.contains("agent.toml is wrong") && text.contains("line 2") && text.contains("`intervall`"), "{text}");
    let text = whole(&agent_of("[heartbeat]\ninterval = '10'\n").unwrap_err());
    assert!(text.contains("`10` is no duration"), "{text}");
    let text = whole(&agent_of("metrics = 'yes'\n").unwrap_err());
    assert!(text.contains("write IP:PORT, or `off`"), "{text}");
}

#[test]
fn several_links_are_several_addresses() {
    let text =
        "heartbeat_listen = ['10.0.0.1:7845', '10.9.0.1:7845']\naddresses = ['10.9.0.1:7844', '10.0.0.1:7844']\n";
    let config = agent_of(text).unwrap();
    assert_eq!(config.heartbeat_listen, ["10.0.0.1:7845", "10.9.0.1:7845"].map(|text| text.parse().unwrap()));
    assert_eq!(config.reachable_at(), ["10.9.0.1:7844", "10.0.0.1:7844"].map(|text| text.parse().unwrap()));
    let one = agent_of("heartbeat_listen = '10.0.0.1:7'\naddresses = '10.0.0.1:7844'\n").unwrap();
    assert_eq!((one.heartbeat_listen.len(), one.addresses.len()), (1, 1));
    let text = whole(&agent_of("heartbeat_listen = 'here'\n").unwrap_err());
    assert!(text.contains("or a list of such"), "{text}");
    let (_dir, path) = written("heartbeat_listen = '10.0.0.9:9'\n");
    let flags = AgentOverrides { heartbeat_listen: one.heartbeat_listen.clone(), ..AgentOverrides::default() };
    assert_eq!(agent(Some(&path), flags).unwrap().heartbeat_listen, one.heartbeat_listen, "flags beat the file");
}

#[test]
fn values_that_cannot_be_are_refused_by_key() {
    for (text, key) in [
        ("name = 'a b'", "name"),
        ("name = ''", "name"),
        ("listen = '1.2.3.4:5'\nheartbeat_listen = '1.2.3.4:5'", "heartbeat_listen"),
        ("heartbeat_listen = []", "heartbeat_listen"),
        ("heartbeat_listen = ['0.0.0.0:1', '1.2.3.4:2']", "heartbeat_listen"),
        ("heartbeat_listen = ['1.2.3.4:2', '1.2.3.4:2']", "heartbeat_listen"),
        ("addresses = ['0.0.0.0:7844']", "addresses"),
        ("addresses = ['1.2.3.4:0']", "addresses"),
        ("[heartbeat]\ninterval = '2s'", "heartbeat.interval"),
        ("[heartbeat]\nsilence = '40ms'", "heartbeat.silence"),
        ("[heartbeat]\nunacknowledged = '1ms'", "heartbeat.unacknowledged"),
        ("[epoch]\npipeline = 0", "epoch.pipeline"),
        ("[epoch]\npipeline = 17", "epoch.pipeline"),
        ("[epoch]\nbusy_share = 91", "epoch.busy_share"),
        ("[epoch]\nwaiting_share = 0", "epoch.waiting_share"),
        ("[epoch]\nidle_share = 0", "epoch.idle_share"),
        ("[epoch]\nlongest = '1ms'", "epoch.longest"),
        ("[epoch]\ngather = '1s'", "epoch.gather"),
        ("[gate]\nbytes = '4KiB'", "gate.bytes"),
        ("[gate]\nage = '10m'", "gate.age"),
        ("[standby]\nstaging = '1MiB'", "standby.staging"),
        ("[etcd]\nendpoints = []\nkey = '/k'", "etcd.certificate"),
        ("[etcd]\nendpoints = []\nuser = 'u'", "etcd.user"),
        ("[etcd]\nendpoints = []\npassword_file = '/p'", "etcd.password_file"),
    ] {
        match agent_of(text) {
            Err(ConfigError::Value { key: found, .. }) => assert_eq!(found, key, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn etcd_is_configured_with_a_password_that_is_not_shown() {
    let (dir, password) = written("word\n");
    let text = format!(
        "[etcd]\nendpoints = ['https://e1:2379']\nca = '/ca'\ncertificate = '/c'\nkey = '/k'\nuser = 'u'\npassword_file = '{}'\n",
        password.display()
    );
    let config = agent_of(&text).expect("it can be used").etcd.expect("it is there");
    assert_eq!((config.prefix.as_str(), config.endpoints.len()), ("understudy/", 1));
    assert_eq!(config.user.as_ref().map(|user| user.password.as_str()), Some("word"));
    assert!(!format!("{config:?}").contains("word"));
    assert!(agent_of("").expect("the defaults").etcd.is_none());
    drop(dir);
}

#[test]
fn a_file_that_was_named_must_exist() {
    let error = agent(Some(Path::new("/nonexistent/agent.toml")), AgentOverrides::default()).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error:?}");
}

#[test]
fn a_witness_has_its_own_port_and_socket() {
    let (_dir, path) = written("name = 'w'\n");
    let config = witness(Some(&path), WitnessOverrides::default()).unwrap();
    assert_eq!(config.listen.port(), DEFAULT_WITNESS_PORT);
    assert_eq!(config.control_socket(), Path::new("/run/understudy-witness/witness.sock"));
    let (_dir, path) = written("metrics = 'off'\n");
    assert!(matches!(witness(Some(&path), WitnessOverrides::default()), Err(ConfigError::Parse { .. })));
}

#[test]
fn fencing_is_required_only_if_it_says_so() {
    let fence = |more: &str| agent_of(&format!("[fence]\ncommand = ['/bin/fence']\n{more}")).unwrap().fence.unwrap();
    assert!(!fence("").required);
    assert!(fence("required = true").required);
    let none = agent_of("[fence]\nrequired = true").unwrap_err();
    assert!(whole(&none).contains("missing field `command`"), "{}", whole(&none));
}
