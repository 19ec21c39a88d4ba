from __future__ import annotations

from xml.etree import ElementTree

import pytest
import xmlschema

from calibrate.reports import junit_report

SCHEMA = """
<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">
  <xs:simpleType name="name"><xs:restriction base="xs:token"><xs:minLength value="1"/></xs:restriction></xs:simpleType>
  <xs:simpleType name="instant"><xs:restriction base="xs:dateTime">
    <xs:pattern value="\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d"/>
  </xs:restriction></xs:simpleType>
  <xs:simpleType name="time"><xs:restriction base="xs:decimal">
    <xs:pattern value="\\d{0,3}(\\.\\d{0,3})?"/>
  </xs:restriction></xs:simpleType>
  <xs:simpleType name="empty"><xs:restriction base="xs:string"><xs:length value="0"/></xs:restriction></xs:simpleType>
  <xs:element name="testsuites"><xs:complexType><xs:sequence>
    <xs:element name="testsuite" maxOccurs="unbounded"><xs:complexType>
      <xs:sequence>
        <xs:element name="properties"><xs:complexType><xs:sequence>
          <xs:element name="property" minOccurs="0" maxOccurs="unbounded"><xs:complexType>
            <xs:attribute name="name" type="name" use="required"/>
            <xs:attribute name="value" type="xs:string" use="required"/>
          </xs:complexType></xs:element>
        </xs:sequence></xs:complexType></xs:element>
        <xs:element name="testcase" minOccurs="0" maxOccurs="unbounded"><xs:complexType>
          <xs:choice minOccurs="0">
            <xs:element name="skipped"><xs:complexType><xs:simpleContent><xs:extension base="empty">
              <xs:attribute name="message" type="xs:string"/>
            </xs:extension></xs:simpleContent></xs:complexType></xs:element>
            <xs:element name="failure"><xs:complexType><xs:simpleContent><xs:extension base="xs:string">
              <xs:attribute name="message" type="xs:string"/>
              <xs:attribute name="type" type="xs:string" use="required"/>
            </xs:extension></xs:simpleContent></xs:complexType></xs:element>
          </xs:choice>
          <xs:attribute name="name" type="name" use="required"/>
          <xs:attribute name="classname" type="name" use="required"/>
          <xs:attribute name="time" type="time" use="required"/>
        </xs:complexType></xs:element>
        <xs:element name="system-out" type="xs:string"/>
        <xs:element name="system-err" type="xs:string"/>
      </xs:sequence>
      <xs:attribute name="name" type="name" use="required"/>
      <xs:attribute name="package" type="name" use="required"/>
      <xs:attribute name="id" type="xs:int" use="required"/>
      <xs:attribute name="timestamp" type="instant" use="required"/>
      <xs:attribute name="hostname" type="name" use="required"/>
      <xs:attribute name="tests" type="xs:int" use="required"/>
      <xs:attribute name="failures" type="xs:int" use="required"/>
      <xs:attribute name="errors" type="xs:int" use="required"/>
      <xs:attribute name="skipped" type="xs:int"/>
      <xs:attribute name="time" type="time" use="required"/>
    </xs:complexType></xs:element>
  </xs:sequence></xs:complexType></xs:element>
</xs:schema>
"""
"""What both the schema of Jenkins' xUnit plugin and that of Ant allow: the stricter rule of the two, each time."""


@pytest.fixture(scope="module")
def schema():
    return xmlschema.XMLSchema(SCHEMA)


@pytest.fixture
def report(make_trace, make_report, judged):
    return judged(make_report(make_trace([0.011, 0.010, 0.012], meta={"model": "me/mine"})))


def test_it_is_valid_and_counts_what_it_holds(report, schema):
    text = junit_report.render(report)
    schema.validate(text)
    suite = ElementTree.fromstring(text).find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), suite.get("errors")) == (
        "3",
        "1",
        "1",
        "0",
    )
    assert [one.get("name") for one in suite.iter("testcase")] == ["ttft.p99", "e2e.mape", "tpot.p50"]


def test_a_failed_gate_fails_and_an_inconclusive_one_is_skipped(report):
    cases = {one.get("name"): one for one in ElementTree.fromstring(junit_report.render(report)).iter("testcase")}
    assert list(cases["ttft.p99"]) == []
    assert cases["e2e.mape"].find("failure").get("message") == "40 % is above 10 %: by hand"
    assert cases["tpot.p50"].find("skipped").get("message") == "holds the limit: by hand"


def test_a_report_without_gates_is_valid_too(make_trace, make_report, schema):
    text = junit_report.render(make_report(make_trace([0.01], meta={"model": "me/mine"})))
    schema.validate(text)
    assert ElementTree.fromstring(text).find("testsuite").get("tests") == "0"


def test_hostile_names_are_valid_and_kept(make_trace, make_report, judged, hostile, schema):
    trace = make_trace([0.01, 0.011], ids=[hostile, "b"], meta={"name": hostile, "model": "me/mine"})
    text = junit_report.render(judged(make_report(trace, name=hostile), hostile))
    schema.validate(text)
    failure = next(ElementTree.fromstring(text).iter("failure"))
    assert failure.text == "40 % is above 10 %: " + hostile.replace("\x00", "\ufffd")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(' hostname="localhost"', ""),
        lambda text: text.replace("<skipped", "<ignored"),
        lambda text: text.replace('type="gate"', ""),
        lambda text: text.replace('tests="3"', 'tests="three"'),
        lambda text: text.replace("<system-err", "<system-out").replace("</system-err", "</system-out"),
    ],
)
def test_the_schema_refuses_what_is_wrong(report, schema, spoil):
    assert not schema.is_valid(spoil(junit_report.render(report)))
